"""Merging an adapter into the base weight of a linear, and taking it out again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import Tensor

from molora.errors import MergeError
from molora.fold import Factors, fold_split_factors
from molora.layouts import LAYOUTS
from molora.quantization import check_merge
from molora.routing import route
from molora.routing.precision import promote

_GIVEN = {"task": "task_ids", "scores": "expert_scores"}
_NAMED = {"task": "task=", "scores": "expert_scores="}


def cannot_merge(
    adapter_name: str, reads: frozenset[str], per_sequence: bool = False, is_linear: bool = True
) -> MergeError:
    """The refusal to merge an adapter that is no fixed linear map, with what can be done instead.

    Args:
        adapter_name: Name of the adapter.
        reads: What its weights depend on, as in `ModulePlan.reads`.
        per_sequence: Whether one decision holds for all tokens of a row.
        is_linear: Whether its experts are linear maps, so that fixed weights would make it one.
    """
    given = [kind for kind in _GIVEN if kind in reads]
    exact = "train a mergeable mixture with MoLoraConfig.from_preset('static')"
    if not is_linear:
        why = "has nonlinear experts"
    elif reads & {"input", "hidden", "state"}:
        why = "routes every token by itself"
        if per_sequence:
            why = "decides by the prompt"
            exact = "pass `prompt=`, the ids of one prompt, to merge exactly for what follows it"
    else:
        why = f"weighs its experts by the {' and '.join(_GIVEN[kind] for kind in given)} of each row"
        exact = f"pass {' and '.join(f'`{_NAMED[kind]}`' for kind in given)} to merge exactly for one of them"
    return MergeError(
        f"adapter {adapter_name!r} {why}, so no single weight reproduces it; merging would silently change the model. "
        "Keep the adapter unmerged (it loads anywhere PEFT does after `import molora`); or take the nearest plain "
        "LoRA, fitted to calibration data and with its error measured: `molora export DIR OUT --as lora --calibrate "
        "data.jsonl`, or `merge_adapter(approximate=True, calibration=batches)`; or export every expert alone with "
        f"`--as experts`; or {exact}."
    )


class MergingMixin:
    """What `MoLoraLinear` has for merging."""

    def is_linear_map(self, adapter_name: str) -> bool:
        """Whether an adapter is a linear map of the input once its mixing weights are fixed."""
        layer: Any = self
        plan, group = layer.molora_plan[adapter_name], layer.molora_group.get(adapter_name)
        nonlinear = plan.after or plan.activation is not None or (group is not None and group.spans_ffn)
        return not nonlinear and not layer._has_bias(adapter_name)

    def is_routed(self, adapter_name: str) -> bool:
        """Whether what an adapter adds is no fixed linear map."""
        layer: Any = self
        if not layer.has_adapter(adapter_name):
            return False
        return not layer.molora_plan[adapter_name].is_constant or not self.is_linear_map(adapter_name)

    def folded(self, adapter_name: str, weights: Tensor | None) -> Factors:
        """The plain LoRA that an adapter is while its mixing weights are fixed.

        Args:
            adapter_name: Name of the adapter.
            weights: `[E]`, with those of shared experts behind them; `[splits, E]` with `num_splits`; `None` for one
                each.

        Returns:
            A `[r, in]` and B `[out, r]` in fp32 or finer, the scale in B.
        """
        layer: Any = self
        plan = layer.molora_plan[adapter_name]
        lora_a, lora_b = (promote(matrix.detach()) for matrix in layer.matrices(adapter_name))
        fold = fold_split_factors if plan.num_splits > 1 else LAYOUTS[plan.layout].folded
        weights = None if weights is None else weights.to(lora_b)
        return fold(lora_a, lora_b, weights, layer.molora_ranks[adapter_name])

    def constant_factors(self, adapter_name: str) -> Factors:
        """The plain LoRA that an adapter is, if it depends on nothing that is passed in.

        Raises:
            MergeError: If it does.
        """
        layer: Any = self
        plan = layer.molora_plan[adapter_name]
        if self.is_routed(adapter_name):
            raise cannot_merge(adapter_name, plan.reads, plan.level == "sequence", self.is_linear_map(adapter_name))
        weights = None  # one each, also where a softmax has a single expert
        if plan.router != "none" and not plan.reads:
            weights = route(layer.router_of(adapter_name)(), layer.molora_spec[adapter_name]).weights
            if plan.num_splits > 1:
                weights = weights.expand(plan.num_splits, -1)
        return self.folded(adapter_name, weights)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The one weight an adapter adds, `[out, in]` (transposed for `Conv1D`), in the dtype of B.

        Raises:
            MergeError: If the gate depends on what is passed in, and no plain LoRA was chosen to stand for it.
        """
        layer: Any = self
        return self._delta(adapter_name).to(layer.matrices(adapter_name)[1].dtype)

    def _delta(self, adapter_name: str) -> Tensor:
        """As above in fp32 or finer, so that 16-bit weights are rounded once."""
        layer: Any = self
        chosen = layer.molora_stand_in.get(adapter_name)
        lora_a, lora_b = self.constant_factors(adapter_name) if chosen is None else chosen
        device = layer.matrices(adapter_name)[1].device
        return transpose((lora_b @ lora_a).to(device), layer.fan_in_fan_out)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' weights to the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity before it replaces the base weight.
            adapter_names: Which to merge; the active ones by default.

        Raises:
            MergeError: If a gate depends on what is passed in, or quantised weights cannot be changed.
            ValueError: If `safe_merge` finds a broken adapter.
        """
        layer: Any = self
        check_merge(layer.quantization_backend)
        for name in check_adapters_to_merge(layer, adapter_names):
            if not layer.has_adapter(name):
                continue
            weight = layer.get_base_weight()
            merged = (promote(weight) + self._delta(name)).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            layer.set_base_weight(merged)
            layer.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged adapters' weights out of the base weight again."""
        layer: Any = self
        if not layer.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_to(0)

    @torch.no_grad()
    def unmerge_to(self, number: int) -> None:
        """Take out the adapters that were merged last, until so many are left."""
        layer: Any = self
        while len(layer.merged_adapters) > number:
            name = layer.merged_adapters.pop()
            weight = layer.get_base_weight()
            layer.set_base_weight((promote(weight) - self._delta(name)).to(weight.dtype))
            layer.molora_stand_in.pop(name, None)
