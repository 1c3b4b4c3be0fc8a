"""Which experts do alike: cosines of what they add, in rank space, for every linear."""

from __future__ import annotations

import torch

from molora.errors import MoloraError
from molora.reports.data import Cosines
from molora.reports.names import in_order
from molora.slim.adapter import Adapter
from molora.slim.experts import experts_of
from molora.slim.similarity import cosine_of_deltas

ALIKE_ABOVE = 0.9
"""Two experts with a higher cosine are nearly the same."""

_SHARED = ("pairs", "shards", "factors")
"""Layouts whose experts have no pair of matrices of their own."""


def cosines_of(adapter: Adapter) -> Cosines | str:
    """Cosines of the experts' `scale · B A` of every linear that has several."""
    if adapter.config.expert_layout in _SHARED:
        return (
            f"With `expert_layout: {adapter.config.expert_layout}` experts have no pair of matrices of their own to "
            "compare."
        )
    try:
        found = experts_of(adapter)
    except MoloraError as error:
        return f"The experts cannot be told apart: {error}"
    experts = {name: found[name] for name in sorted(found, key=in_order) if len(found[name]) > 1}
    if not experts:
        return "No linear has more than one expert, so there is nothing to compare."
    labels, matrices, pairs, empty = [], [], [], []
    for name, bank in experts.items():
        cosine = cosine_of_deltas([bank], len(bank))
        routed = adapter.plan(name).num_experts
        own = [str(index) if index < routed else f"shared {index - routed}" for index in range(len(bank))]
        labels.append(own)
        matrices.append(cosine)
        empty += [(name, own[index]) for index in range(len(bank)) if not bool(cosine[index, index])]
        above = (cosine > ALIKE_ABOVE).triu(diagonal=1).nonzero().tolist()
        pairs += [(name, own[first], own[second], float(cosine[first, second])) for first, second in above]
    most = max(map(len, matrices))
    mean = torch.stack([matrix for matrix in matrices if len(matrix) == most]).mean(dim=0)
    listed = [[[round(value, 3) for value in row] for row in matrix.tolist()] for matrix in (*matrices, mean)]
    pairs.sort(key=lambda pair: -pair[3])
    return Cosines(list(experts), labels, listed[:-1], listed[-1], pairs, empty)
