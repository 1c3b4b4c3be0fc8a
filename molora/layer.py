"""The adapted modules: a frozen module plus, for each active adapter, its mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils import quantization_extra_repr
from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.decide import Products, decide
from molora.errors import MoloraError
from molora.ffn import combine_slots, expand_slots
from molora.kernels import split_factors
from molora.layouts import ACTIVATIONS, LAYOUTS
from molora.merging import MergingMixin
from molora.paths import fast_output
from molora.plan import ModulePlan
from molora.routing.precision import autocast_enabled
from molora.watch import Seen

BASE_ADAPTER = "__base__"
"""In `adapter_names`, stands for the base model without any adapter."""


class MoLoraModule(nn.Module, MoLoraLayer):
    """What the adapted modules share: which adapters apply, and what each adds.

    Args:
        base_layer: The frozen module.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        plan: What of it concerns this module.
        in_features: Size of the module's input.
        out_features: Size of its output.
        **kwargs: `group`, `pool` and `reads` as in `update_layer`, `module_key`, and what PEFT knows of quantisation.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoLoraConfig,
        plan: ModulePlan,
        in_features: int,
        out_features: int,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        options = {name: kwargs.pop(name, None) for name in ("group", "pool", "reads")}
        self.routing_name = self.module_key = kwargs.pop("module_key", "")
        self._init_containers(base_layer, in_features, out_features, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, plan, **options, inference_mode=config.inference_mode)

    def delta(self, adapter_name: str, x: Tensor, rows: list[int] | None = None) -> Tensor:
        """What an adapter adds for the input `[..., in]` of its experts, `[..., out]`.

        Args:
            adapter_name: Name of the adapter.
            x: Input of the experts.
            rows: Which rows of the batch these are; `None` for all.
        """
        plan = self.molora_plan[adapter_name]
        hidden, dtype = self._down(adapter_name, x)
        routing = decide(self, adapter_name, x, Products(hidden), rows)
        weights = None if routing is None else routing.weights
        gated_by = split_factors if plan.num_splits > 1 else LAYOUTS[plan.layout].gated
        activation = ACTIVATIONS[plan.activation] if plan.activation else None
        gated = gated_by(hidden, weights, self.molora_ranks[adapter_name], activation)
        if self.watcher is not None:
            self.watcher(self, adapter_name, Seen(x, gated, weights))
        # An fp32 gate promotes a 16-bit hidden; without autocast the second product needs equal dtypes.
        return self.output(adapter_name, gated.to(dtype))

    def _down(self, adapter_name: str, x: Tensor) -> tuple[Tensor, torch.dtype]:
        """`A x`, and the dtype that B is multiplied in."""
        if not autocast_enabled(x):
            x = self._cast_input_dtype(x, self._dtype_of(adapter_name))
        dropout, drops_hidden = self.molora_dropout[adapter_name], self.molora_plan[adapter_name].drops_hidden
        hidden = self.hidden(adapter_name, x if drops_hidden else dropout(x))
        return dropout(hidden) if drops_hidden else hidden, x.dtype

    def _dtype_of(self, adapter_name: str) -> torch.dtype:
        for container in (self.molora_A, self.molora_frozen_A):
            if adapter_name in container:
                return container[adapter_name].dtype
        raise KeyError(adapter_name)

    def _is_off(self) -> bool:
        return self._disable_adapters or (self.routing_scope is not None and self.routing_scope.silent)

    def _applied(self, adapter_names: list[str] | None) -> list[tuple[str, list[int] | None]]:
        """The adapters that apply, each with the rows of the batch it applies to, `None` for all."""
        if adapter_names is None:
            return [(name, None) for name in self.active_adapters if self.has_adapter(name)]
        return [
            (name, [row for row, given in enumerate(adapter_names) if given == name])
            for name in dict.fromkeys(adapter_names)
            if name != BASE_ADAPTER and self.has_adapter(name)
        ]

    def _add(self, result: Tensor, x: Tensor, adapter_names: list[str] | None) -> Tensor:
        """Add what the adapters add, each to its rows."""
        dtype, frozen = result.dtype, result
        if adapter_names is not None:
            result = result.clone()
        elif self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name, rows in self._applied(adapter_names):
            source = frozen if self.molora_plan[name].after else x
            if rows is None:
                result = result + self.delta(name, source)
            else:
                result[rows] = (result[rows] + self.delta(name, source[rows], rows)).to(dtype)
        return result.to(dtype)

    def _check_forward_args(self, x: Tensor, adapter_names: list[str] | None) -> None:
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may turn the adapter into a plain LoRA: only if its gate is fixed."""
        return not self.is_routed(adapter_name)

    def is_routed(self, adapter_name: str) -> bool:
        """Whether what an adapter adds is no fixed linear map."""
        return self.has_adapter(adapter_name)

    def _has_bias(self, adapter_name: str) -> bool:
        return any(
            getattr(container[adapter_name], "bias", None) is not None
            for container in (self.molora_A, self.molora_frozen_A)
            if adapter_name in container
        )

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


class MoLoraLinear(MergingMixin, MoLoraModule):
    """A frozen linear plus mixtures of LoRA experts: each active adapter adds `B((scale · gate(x)) ⊙ (A x))`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear that PEFT knows.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        plan: What of it concerns this linear.
        **kwargs: As for `MoLoraModule`.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MoLoraConfig, plan: ModulePlan, **kwargs: Any
    ) -> None:
        inner = base_layer.get_base_layer() if hasattr(base_layer, "get_base_layer") else base_layer
        in_features, out_features = _get_in_out_features(inner)
        if in_features is None or out_features is None:
            raise TypeError(f"molora adapts linear layers; {type(inner).__name__} is none.")
        super().__init__(base_layer, adapter_name, config, plan, in_features, out_features, **kwargs)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Map `[..., in]` to `[..., out]`.

        Args:
            x: Input.
            *args: Passed to the base layer.
            adapter_names: For each row of the batch the adapter to use, or `"__base__"` for none.
            **kwargs: Passed to the base layer.
        """
        if adapter_names is not None:
            self._check_forward_args(x, adapter_names)
        if self.merged_adapters or self._is_off():
            if self.merged_adapters and self._disable_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.molora_group:
            spanning = self._spanning_adapter(adapter_names)
            if spanning is not None:
                return self._forward_in_ffn(spanning, x, *args, **kwargs)
        result = fast_output(self, x, adapter_names, args, kwargs)
        if result is not None:
            return result
        return self._add(self.base_layer(x, *args, **kwargs), x, adapter_names)

    def _spanning_adapter(self, adapter_names: list[str] | None) -> str | None:
        """The adapter whose experts span the feed-forward block that this linear is in, if there is one."""
        names = [name for name, _ in self._applied(adapter_names)]
        spans = [name for name in names if name in self.molora_group and self.molora_group[name].spans_ffn]
        if not spans:
            return None
        if len(names) > 1 or adapter_names is not None:
            raise MoloraError(
                f"the experts of adapter {spans[0]!r} span whole feed-forward blocks, so it cannot share a batch or a "
                "block with other adapters; use one adapter at a time."
            )
        return spans[0]

    def _forward_in_ffn(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        down = self._down(name, x)
        if not self.molora_group[name].is_last(self):
            return expand_slots(self, name, x, down, self.base_layer(x, *args, **kwargs))
        return combine_slots(self, name, x, down, lambda mixed: self.base_layer(mixed, *args, **kwargs))

    def extra_repr(self) -> str:
        """Show the kind of quantisation, if any, in `print(model)`."""
        return quantization_extra_repr(self)
