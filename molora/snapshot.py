"""The values one module holds for an adapter, while the adapter is built anew with more experts or fewer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molora.bank import MoLoraLayer
from molora.plan import ModulePlan
from molora.routing import Affine


class Snapshot:
    """The values one module holds for an adapter, to be put into a larger or smaller one."""

    def __init__(self, layer: MoLoraLayer, name: str) -> None:
        self.plan: ModulePlan = layer.molora_plan[name]
        self.group = layer.molora_group.get(name)
        self.reads = layer.molora_input.get(name)
        self.before = layer.molora_before.get(name)
        self.matrices = [matrix.detach().clone() for matrix in layer.matrices(name)]
        self.bias = _bank_bias(layer, name)
        parts = ("molora_router", "molora_threshold", "molora_blend", "molora_bias")
        self.parts = {part: getattr(layer, part)[name] for part in parts if name in getattr(layer, part)}

    def restore(self, layer: MoLoraLayer, name: str, order: Sequence[int | None]) -> None:
        """Copy what is kept; `order` names for each routed expert the old one it was, or `None` for a fresh one."""
        shared = range(self.plan.num_experts, self.plan.bank_experts)
        self._restore_dtypes(layer, name)
        self._restore_bank(layer, name, [*order, *shared])
        nulls = range(self.plan.num_experts, self.plan.num_experts + self.plan.spec.null_experts)
        for part, old in self.parts.items():
            new = getattr(layer, part)[name]
            sized = old.by_expert() if part == "molora_router" else {}
            if part == "molora_bias":
                sized = {"weight": (old.weight.data, 0)}
            targets = new.by_expert() if part == "molora_router" else {"weight": (new.weight.data, 0)} if sized else {}
            for key, value in old.named_parameters():
                if key in sized:
                    _take(targets[key][0], sized[key][0], sized[key][1], [*order, *nulls])
                else:
                    dict(new.named_parameters())[key].data.copy_(value)
            if isinstance(old, Affine) and old.input_mean is not None and old.input_std is not None:
                new.set_statistics(old.input_mean, old.input_std)
                new.awaits_data = old.awaits_data

    def _restore_dtypes(self, layer: MoLoraLayer, name: str) -> None:
        """New parts come in the dtype of the base layer, and trained ones are often kept in a finer one."""
        for downs, ups, _ in layer.banks(name):
            downs.to(self.matrices[0].dtype)
            ups.to(self.matrices[1].dtype)
        for part, old in self.parts.items():
            for parameter in old.parameters():
                getattr(layer, part)[name].to(parameter.dtype)

    def _restore_bank(self, layer: MoLoraLayer, name: str, order: Sequence[int | None]) -> None:
        rows = _rank_order(self.plan, layer.molora_plan[name], order)
        factors = _kept_scales(self.plan, layer.molora_plan[name], order)
        start = 0
        for downs, ups, _ in layer.banks(name):
            size = ups.weight.shape[1]
            part = rows[start : start + size]
            if self.plan.layout == "shared_A":
                downs.weight.copy_(self.matrices[0])
            else:
                _take(downs.weight.data, self.matrices[0], 0, part)
            _take(ups.weight.data, self.matrices[1], 1, part)
            if any(factor != 1 for factor in factors):
                ups.weight.mul_(torch.tensor(factors[start : start + size]).to(ups.weight))
            if self.bias is not None:
                _take(downs.bias.data, self.bias, 0, part)
            start += size


def _bank_bias(layer: MoLoraLayer, name: str) -> Tensor | None:
    biases = [downs.bias for downs, _, _ in layer.banks(name) if downs.bias is not None]
    return torch.cat([bias.detach().clone() for bias in biases]) if biases else None


def _rank_order(old: ModulePlan, new: ModulePlan, order: Sequence[int | None]) -> list[int | None]:
    """For each rank of the new bank the old rank it was, or `None`."""
    starts = [sum(old.ranks[:expert]) for expert in range(old.bank_experts)]
    ranks: list[int | None] = []
    for expert, rank in zip(order, new.ranks, strict=True):
        ranks += [None] * rank if expert is None else [*range(starts[expert], starts[expert] + rank)]
    return ranks


def _kept_scales(old: ModulePlan, new: ModulePlan, order: Sequence[int | None]) -> list[float]:
    """What each column of B is multiplied with, so that experts do what they did where scales follow all ranks."""
    factors: list[float] = []
    for expert, rank, scale in zip(order, new.ranks, new.scales, strict=True):
        factors += [1.0 if expert is None or not scale else old.scales[expert] / scale] * rank
    return factors


def _take(target: Tensor, source: Tensor, dim: int, order: Sequence[int | None]) -> None:
    """Copy the parts of `source` that `order` names into `target`, both along `dim`."""
    places = [place for place, origin in enumerate(order) if origin is not None]
    origins = [origin for origin in order if origin is not None]
    if places:
        index = torch.tensor(places, device=target.device)
        values = source.index_select(dim, torch.tensor(origins, device=source.device)).to(target)
        target.index_copy_(dim, index, values)
