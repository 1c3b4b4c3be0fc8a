"""Which experts do alike, and who goes with whom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from molora.slim.adapter import Adapter
from molora.slim.experts import Expert, Experts
from molora.slim.routers import router_of
from molora.slim.statistics import ModuleStatistics


def similarity(
    adapter: Adapter,
    holder: str,
    members: Sequence[str],
    experts: Experts,
    usage: Sequence[ModuleStatistics] | None,
) -> Tensor:
    """How alike the routed experts of one routing group are, `[E, E]`, in [-1, 1].

    With statistics it is the correlation of their probabilities over tokens. Without, or where the decision does not
    depend on the token, it is the cosine of their rows of the router, and where they have no rows to speak of, the
    cosine of what they add.

    Args:
        adapter: The adapter.
        holder: The module that holds the router.
        members: The modules that route together.
        experts: The experts of all modules.
        usage: Statistics of the members.
    """
    number = adapter.plan(holder).num_experts
    seen = [one.correlation() for one in usage or () if one.products.ndim]
    if seen:
        return torch.stack(seen).mean(dim=0)
    router = router_of(adapter, holder)
    values = {} if router is None else router.by_expert()
    if "weight" not in values or values["weight"][0].ndim < 2:
        return cosine_of_deltas([experts[module] for module in members], number)
    value, dim = values["weight"]
    rows = value.double().movedim(dim, 0).flatten(1)[:number]
    cosine = normalize(rows, dim=-1) @ normalize(rows, dim=-1).T
    return cosine.abs() if adapter.config.router == "arrow" else cosine  # which reads no sign


def cosine_of_deltas(banks: Sequence[Sequence[Expert]], number: int) -> Tensor:
    """Cosine of the experts' `scale · B A`, over several modules as one vector, `[E, E]`."""
    products = torch.zeros(number, number, dtype=torch.float64)
    for bank in banks:
        for first in range(number):
            for second in range(first, number):
                value = _inner(bank[first], bank[second])
                products[first, second] += value
                if first != second:
                    products[second, first] += value
    norms = products.diagonal().clamp(min=0).sqrt()
    return products / norms.outer(norms).clamp(min=torch.finfo(torch.float64).tiny)


def groups_of(similarities: Tensor, number: int) -> list[list[int]]:
    """Join the most similar groups, by the mean over their pairs, until a number is left.

    Args:
        similarities: `[E, E]`.
        number: Groups wanted, at most E.

    Returns:
        The groups' members in order, and the groups in the order of their first ones.
    """
    groups = [[index] for index in range(len(similarities))]
    while len(groups) > number:
        pairs = [(first, second) for second in range(len(groups)) for first in range(second)]
        first, second = max(pairs, key=lambda pair: _linkage(similarities, groups[pair[0]], groups[pair[1]]))
        groups[first] = sorted(groups[first] + groups.pop(second))
    return sorted(groups)


def _linkage(similarities: Tensor, first: list[int], second: list[int]) -> float:
    return float(similarities[first][:, second].mean())


def _inner(first: Expert, second: Expert) -> float:
    """Inner product of two experts' deltas, `tr((B₁ᵀ B₂)(A₂ A₁ᵀ))`."""
    (down_1, up_1, scale_1), (down_2, up_2, scale_2) = (
        (one.down.double(), one.up.double(), one.scale) for one in (first, second)
    )
    return float(((up_1.T @ up_2) * (down_1 @ down_2.T)).sum()) * scale_1 * scale_2
