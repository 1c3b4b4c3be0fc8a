"""The experts of an adapter one by one, and an adapter put together of experts again.

An expert comes with its scale. Where a change of ranks changes the scale that follows from the config, B makes up for
it, so that what an expert does never depends on what happened to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.plan import ModulePlan
from molora.routing.precision import promote
from molora.slim.adapter import PREFIX, Adapter, disagreement
from molora.slim.fields import rank_fields

_CONTAINERS = ("molora_A", "molora_B", "molora_frozen_A", "molora_frozen_B")


@dataclass(frozen=True)
class Expert:
    """One expert of one module: it adds `scale · up · a(down · u + bias)`.

    Attributes:
        down: Its rows of A, `[r, in]`; the same for all with `expert_layout: shared_A`.
        up: Its columns of B, `[out, r]`.
        scale: As the config says.
        bias: `[r]`, with `expert_bias`.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """Its rank, 0 for an expert that adds nothing."""
        return self.up.shape[1]

    def only(self, ranks: Tensor | Sequence[int]) -> Expert:
        """The same expert with some of its ranks, given by their indices."""
        index = torch.as_tensor(ranks, dtype=torch.long)
        bias = None if self.bias is None else self.bias[index]
        return Expert(self.down[index], self.up[:, index], self.scale, bias)


Experts = Mapping[str, Sequence[Expert]]
"""The experts of each adapted module, shared ones last."""


def experts_of(adapter: Adapter) -> dict[str, list[Expert]]:
    """The experts of every adapted module, by its full name.

    Raises:
        MoloraError: If the tensors are not what the config says.
    """
    return {module: _experts_at(adapter, module) for module in adapter.modules}


def rebuilt(adapter: Adapter, experts: Experts, **fields: Any) -> Adapter:
    """The adapter with other experts; everything but their matrices, and the fields that follow, stays.

    Args:
        adapter: The adapter.
        experts: Its new experts, for every adapted module.
        **fields: Fields of the config that change beside ranks.

    Raises:
        ConfigError: If the result is impossible.
    """
    plain = {module for module in adapter.modules if adapter.placement.is_plain(module)}
    ranks = {module: tuple(expert.rank for expert in own) for module, own in experts.items()}
    fields = {**fields, **rank_fields(adapter.config, ranks, plain, fields)}
    new = Adapter(dataclasses.replace(adapter.config, **fields), adapter.tensors)
    layers = adapter.num_layers
    new.__dict__["num_layers"] = None if isinstance(new.config.num_experts, int) else layers
    banks = tuple(f"{PREFIX}{module}.{name}." for module in experts for name in _CONTAINERS)
    tensors = {key: value for key, value in adapter.tensors.items() if not key.startswith(banks)}
    for module, own in experts.items():
        plan = new.plan(module)
        if plan.ranks != ranks[module]:
            raise disagreement(module, f"the new ranks {list(ranks[module])} came out as {list(plan.ranks)}")
        tensors |= _bank_tensors(adapter, module, plan, own)
    return Adapter(new.config, tensors)


def _experts_at(adapter: Adapter, module: str) -> list[Expert]:
    plan, ranks = adapter.plan(module), adapter.plan(module).ranks
    down = _joined(adapter, module, "A.weight", 0)
    up = _joined(adapter, module, "B.weight", 1)
    bias = _joined(adapter, module, "A.bias", 0)
    shares = plan.layout == "shared_A"
    rows = ranks[0] if shares else sum(ranks)
    if down is None or up is None or (down.shape[0], up.shape[1]) != (rows, sum(ranks)):
        raise disagreement(module, f"ranks are {list(ranks)}, and the matrices have others")
    downs = [down] * len(ranks) if shares else down.split(ranks)
    ups = up.split(ranks, dim=1)
    biases = [None] * len(ranks) if bias is None else [bias] * len(ranks) if shares else bias.split(ranks)
    return [Expert(*parts) for parts in zip(downs, ups, plan.scales, biases, strict=True)]


def _joined(adapter: Adapter, module: str, name: str, dim: int) -> Tensor | None:
    parts = [adapter.tensor(module, f"{prefix}{name}") for prefix in ("molora_frozen_", "molora_")]
    found = [part for part in parts if part is not None]
    return torch.cat(found, dim=dim) if found else None


def _bank_tensors(adapter: Adapter, module: str, plan: ModulePlan, experts: Sequence[Expert]) -> dict[str, Tensor]:
    """The tensors of a module's bank, the frozen experts apart."""
    shares = plan.layout == "shared_A"
    frozen = next(n for n in range(len(plan.ranks) + 1) if sum(plan.ranks[:n]) == plan.frozen_rank)
    if not plan.frozen_rank:
        frozen = 0
    tensors: dict[str, Tensor] = {}
    for kind, part in (("frozen_", range(frozen)), ("", range(frozen, len(experts)))):
        own = [experts[index] for index in part]
        if not sum(expert.rank for expert in own) and (kind or plan.frozen_rank):
            continue
        downs, ups = (
            [expert.down for expert in own],
            [_rescaled(expert, plan.scales[index]) for index, expert in zip(part, own, strict=True)],
        )
        named = {
            f"molora_{kind}A.weight": downs[0] if shares else torch.cat(downs),
            f"molora_{kind}B.weight": torch.cat(ups, 1),
        }
        biases = [expert.bias for expert in own if expert.bias is not None]
        if biases:
            named[f"molora_{kind}A.bias"] = biases[0] if shares else torch.cat(biases)
        for name, value in named.items():
            tensors[f"{PREFIX}{module}.{name}"] = value.to(_dtype(adapter, module, name, value)).clone()
    return tensors


def _rescaled(expert: Expert, scale: float) -> Tensor:
    """B for another scale than the one it was trained with."""
    if expert.scale == scale or not expert.rank:
        return expert.up
    return promote(expert.up) * (expert.scale / scale)


def _dtype(adapter: Adapter, module: str, name: str, value: Tensor) -> torch.dtype:
    """The dtype that a tensor was stored in."""
    for known in (name, name.replace("frozen_", ""), name.replace("molora_", "molora_frozen_")):
        before = adapter.tensor(module, known)
        if before is not None:
            return before.dtype
    return value.dtype
