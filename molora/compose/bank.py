"""LoRA-bank: choose, by a few examples of the task, which of many trained adapters become experts.

Rocket ("Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models"; code Yaphabates/Rocket):
candidates that explain the examples badly are dropped; of the rest, those are taken that resemble each other least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.imported import ImportedLora

MOST_COMBINATIONS = 1_000_000


def diversity(loras: Sequence[ImportedLora]) -> Tensor:
    """Return how much adapters resemble each other, pair by pair.

    The sum over all tensors, A and B of every module apart, of `|cos|` between the two adapters' tensors. Adapters of
    unequal rank are compared on the ranks both have, a module that one of them lacks adds nothing.

    Args:
        loras: N adapters.

    Returns:
        `[N, N]` in fp32, symmetric; small means diverse. The diagonal is zero.
    """
    similarity = torch.zeros(len(loras), len(loras))
    for (i, one), (j, other) in itertools.combinations(enumerate(loras), 2):
        total = 0.0
        for module in one.factors.keys() & other.factors.keys():
            (a1, b1, _), (a2, b2, _) = one.factors[module], other.factors[module]
            total += _cosine(a1, a2) + _cosine(b1, b2)
        similarity[i, j] = similarity[j, i] = total
    return similarity


def _cosine(one: Tensor, other: Tensor) -> float:
    """`|cos|` of two matrices filled up with zeros to one shape."""
    rows, columns = (min(sizes) for sizes in zip(one.shape, other.shape, strict=True))
    product = (one[:rows, :columns].double() * other[:rows, :columns].double()).sum().abs()
    return float(product / (one.double().norm() * other.double().norm()).clamp(min=1e-8))


def select_experts(scores: Sequence[float], similarity: Tensor, k: int, pool: int | None = None) -> list[int]:
    """Choose K of N candidates: good ones first, then the most diverse group of them.

    The authors look at every group of 4 of a pool they narrow by hand; how far is not published.

    Args:
        scores: One number a candidate, lower is better, as `score_candidates` returns.
        similarity: `[N, N]`, as `diversity` returns.
        k: Size of the group.
        pool: How many of the best-scoring candidates may be in the group. Default three quarters, at most `2 * k`.

    Returns:
        Indices of the chosen, in their given order.

    Raises:
        MoloraError: If there are fewer candidates than K, or the pool has too many groups to look at.
    """
    if not 1 <= k <= len(scores):
        raise MoloraError(f"cannot select {k} of {len(scores)} adapters; give a number from 1 to {len(scores)}.")
    default = max(k, min(2 * k, math.ceil(0.75 * len(scores))))
    pool = min(default if pool is None else pool, len(scores))
    if pool < k:
        raise MoloraError(f"cannot select {k} adapters from a pool of {pool}; the pool must be at least {k}.")
    if math.comb(pool, k) > MOST_COMBINATIONS:
        raise MoloraError(
            f"a pool of {pool} has {math.comb(pool, k):,} groups of {k}, more than the {MOST_COMBINATIONS:,} that are "
            "looked at; give a smaller pool."
        )
    best = sorted(sorted(range(len(scores)), key=scores.__getitem__)[:pool])
    cost = similarity.tolist()
    groups = itertools.combinations(best, k)
    return list(min(groups, key=lambda group: sum(cost[i][j] for i, j in itertools.combinations(group, 2))))
