"""The adapted linear layer: holds the parameters of every adapter on one base linear and adds their mixtures.

Parameter names, which are the checkpoint format (version 1), with `<adapter>` the adapter's name:

    molora_A.<adapter>.weight          [R, in]    all experts' A, expert after expert
    molora_B.<adapter>.weight          [out, R]   all experts' B, in the same order
    molora_router.<adapter>.weight     [E, in]    router="linear"; [E] for "static"; absent for "none"
    molora_threshold.<adapter>.weight  [1, in]    selection="adaptive_threshold" only
    molora_threshold.<adapter>.bias    [1]        as above
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import Tensor, nn

from molora.config import MoLoraConfig
from molora.errors import MergeError
from molora.experts import BankWeight, RankMap, init_bank
from molora.kernels import gated_lora
from molora.routing import ROUTERS, RoutingSpec, ThresholdNet, route
from molora.routing.record import RoutingRecorder
from molora.routing.router import autocast_enabled, init_router, init_threshold

BASE_ADAPTER = "__base__"
"""In `adapter_names`, stands for the base model without any adapter."""


def cannot_merge(adapter_name: str) -> MergeError:
    """The refusal to merge an adapter whose gate depends on the token."""
    return MergeError(
        f"adapter {adapter_name!r} routes every token by itself, so no single weight reproduces it; merging would "
        "silently change the model. Keep the adapter unmerged (it loads anywhere PEFT does after `import molora`), or "
        "train a mergeable mixture with MoLoraConfig.from_preset('static')."
    )


class MoLoraLayer(BaseTunerLayer):
    """What PEFT asks of an adapter layer: containers keyed by adapter name, and how to fill and clear them."""

    adapter_layer_names = ("molora_A", "molora_B", "molora_router", "molora_threshold")
    other_param_names = ("molora_ranks", "molora_dropout", "molora_spec")
    routing_recorder: RoutingRecorder | None = None
    routing_name = ""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.molora_A = nn.ModuleDict()
        self.molora_B = nn.ModuleDict()
        self.molora_router = nn.ModuleDict()
        self.molora_threshold = nn.ModuleDict()
        self.molora_ranks = nn.ModuleDict()
        self.molora_dropout = nn.ModuleDict()
        self.molora_spec: dict[str, RoutingSpec] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        if in_features is None or out_features is None:
            raise TypeError(f"molora adapts linear layers; {type(self.get_base_layer()).__name__} is none.")
        self.in_features: int = in_features
        self.out_features: int = out_features

    def update_layer(
        self,
        adapter_name: str,
        config: MoLoraConfig,
        r: int | list[int],
        lora_alpha: float,
        inference_mode: bool = False,
    ) -> None:
        """Add an adapter to this linear, freshly initialised.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            r: Rank of one expert, or of each, after `rank_pattern`.
            lora_alpha: After `alpha_pattern`.
            inference_mode: Create the parameters frozen.
        """
        for container in (self.molora_router, self.molora_threshold):
            if adapter_name in container:  # of an earlier adapter of this name, which may have routed otherwise
                del container[adapter_name]
        ranks = RankMap(*config.bank_layout(r, lora_alpha))
        self.molora_ranks[adapter_name] = ranks
        self.molora_spec[adapter_name] = config.routing_spec()
        self.molora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.molora_A[adapter_name] = BankWeight(ranks.total_rank, self.in_features)
        self.molora_B[adapter_name] = BankWeight(self.out_features, ranks.total_rank)
        router_class = ROUTERS[config.router]
        if router_class is not None:
            self.molora_router[adapter_name] = router_class(self.in_features, config.num_experts)
        if config.selection == "adaptive_threshold":
            self.molora_threshold[adapter_name] = ThresholdNet(self.in_features)
        self.reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def reset_parameters(self, adapter_name: str, config: MoLoraConfig) -> None:
        """Draw an adapter's initial weights; nothing to do while they are on the meta device."""
        lora_a, lora_b = self.molora_A[adapter_name].weight, self.molora_B[adapter_name].weight
        if lora_a.is_meta:
            return
        init_bank(lora_a, lora_b, self.molora_ranks[adapter_name].ranks, config.init_weights)
        if adapter_name in self.molora_router:
            init_router(self.molora_router[adapter_name], config.router_init, config.router_init_range)
        if adapter_name in self.molora_threshold:
            init_threshold(self.molora_threshold[adapter_name])


class MoLoraLinear(nn.Module, MoLoraLayer):
    """A frozen linear plus mixtures of LoRA experts: each active adapter adds `B((scale · gate(x)) ⊙ (A x))`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear that PEFT knows.
        adapter_name: Name of the first adapter.
        config: Its configuration.
        r: Rank of one expert, or of each.
        lora_alpha: Numerator of the scale.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoLoraConfig,
        r: int | list[int],
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        MoLoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Map `[..., in]` to `[..., out]`.

        Args:
            x: Input.
            *args: Passed to the base layer.
            adapter_names: For each row of the batch the adapter to use, or `"__base__"` for none.
            **kwargs: Passed to the base layer.
        """
        self._check_forward_args(x, adapter_names)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        dtype = result.dtype
        if adapter_names is not None:
            return self._add_by_row(result, x, adapter_names)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for name in self.active_adapters:
            if name in self.molora_A:
                result = result + self._delta(name, x)
        return result.to(dtype)

    def _add_by_row(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        result = result.clone()
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or name not in self.molora_A:
                continue
            rows = [row for row, given in enumerate(adapter_names) if given == name]
            result[rows] = (result[rows] + self._delta(name, x[rows])).to(result.dtype)
        return result

    def _delta(self, adapter_name: str, x: Tensor) -> Tensor:
        lora_a, lora_b = self.molora_A[adapter_name], self.molora_B[adapter_name]
        rank_gate = self._rank_gate(adapter_name, x)
        if not autocast_enabled(x):
            x = self._cast_input_dtype(x, lora_a.weight.dtype)
        return gated_lora(self.molora_dropout[adapter_name](x), lora_a, lora_b, rank_gate)

    def _rank_gate(self, adapter_name: str, x: Tensor) -> Tensor | float:
        ranks = self.molora_ranks[adapter_name]
        if adapter_name not in self.molora_router:
            return ranks(None)
        x = x.float()  # once for both: routing is fp32 maths
        threshold = self.molora_threshold[adapter_name](x) if adapter_name in self.molora_threshold else None
        routing = route(self.molora_router[adapter_name](x), self.molora_spec[adapter_name], threshold)
        if self.routing_recorder is not None and self._is_routed(adapter_name):
            self.routing_recorder.append(self.routing_name, adapter_name, routing)
        return ranks(routing.weights)

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
        """Whether PEFT may turn the adapter into a plain LoRA: only if its gate ignores the input."""
        return not self._is_routed(adapter_name)

    def _is_routed(self, adapter_name: str) -> bool:
        return adapter_name in self.molora_router and self.molora_router[adapter_name].reads_input

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The one weight an adapter adds, `[out, in]` (transposed for `Conv1D`), in the dtype of B.

        Raises:
            MergeError: If the gate depends on the token.
        """
        if self._is_routed(adapter_name):
            raise cannot_merge(adapter_name)
        lora_a, lora_b = self.molora_A[adapter_name].weight, self.molora_B[adapter_name].weight
        ranks = self.molora_ranks[adapter_name]
        weights = None
        if adapter_name in self.molora_router:
            weights = route(self.molora_router[adapter_name](), self.molora_spec[adapter_name]).weights
        delta = (lora_b.float() * ranks(weights)) @ lora_a.float()
        return transpose(delta.to(lora_b.dtype), self.fan_in_fan_out)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before it replaces the base weight.
            adapter_names: Which to merge; the active ones by default.

        Raises:
            MergeError: If a gate depends on the token.
            ValueError: If `safe_merge` finds a broken adapter.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.molora_A:
                continue
            weight = self.get_base_weight()
            merged = weight + self.get_delta_weight(name).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take the merged adapters' weights out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            weight = self.get_base_weight()
            self.set_base_weight(weight - self.get_delta_weight(name).to(weight.dtype))

    def extra_repr(self) -> str:
        """Show the kind of quantisation, if any, in `print(model)`."""
        return quantization_extra_repr(self)

    def __repr__(self) -> str:
        return "molora." + super().__repr__()
