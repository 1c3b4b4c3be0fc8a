"""From sums over rows to what a page shows of routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from molora.plan import layer_of
from molora.reports.data import Affinity, Histogram, Matrix, TokenRouting, Usage
from molora.reports.watch import Seen
from molora.routing.affinity import load, mutual_information, shares

MOST_TOKENS = 240
"""Tokens of a text that a page shows."""


def usage_of(seen: Seen, highest: float) -> Usage:
    """Experts per token, averaged over linears, and thresholds.

    Args:
        seen: What the rows showed.
        highest: What learned thresholds can reach.
    """
    width = max(map(len, seen.counts.values()))
    rows = [torch.nn.functional.pad(shares(counts), (0, width - len(counts))) for counts in seen.counts.values()]
    spread = torch.stack(rows).mean(dim=0)
    numbers = torch.arange(width, dtype=torch.double)
    by_module = {name: float(row @ numbers) for name, row in zip(seen.counts, rows, strict=True)}
    thresholds = None
    if seen.thresholds:
        bins = torch.stack(list(seen.thresholds.values())).sum(dim=0)
        total, number = torch.stack(list(seen.threshold_sums.values())).sum(dim=0).tolist()
        thresholds = Histogram(_rounded(shares(bins)), highest, total / max(number, 1))
    tokens = max(int(one.tokens.sum()) for one in seen.sums.values())
    return Usage(tokens, _rounded(spread), sum(by_module.values()) / len(by_module), by_module, thresholds)


def end_loads(seen: Seen) -> dict[str, list[float]]:
    """Share of the selections that falls on each expert of each linear, every task counting the same."""
    return {name: _rounded(load(one.selected)[0]) for name, one in seen.sums.items()}


def affinity_of(seen: Seen, tasks: Sequence[str]) -> Affinity | str:
    """What experts each task uses, and what they tell about it."""
    if len(tasks) < 2:
        return (
            "With one task there is nothing to tell apart. Give rows of several, `--data FILE`, whose `task` column "
            "names them."
        )
    weights = {name: shares(one.weights)[0] for name, one in seen.sums.items()}
    bits = [float(mutual_information(one.weights)[0].clamp(min=0)) for one in seen.sums.values()]
    widest = max(seen.sums.values(), key=lambda one: float(one.tokens.sum()))
    tokens = [int(number) for number in widest.tokens[0].tolist()]
    return Affinity(
        list(tasks), tokens, list(weights), [[_rounded(row) for row in one] for one in weights.values()], bits
    )


def token_routing(
    weights: Mapping[str, Tensor], pieces: Sequence[str], origin: str, left_out: int = 0
) -> TokenRouting | str:
    """The routing of a text, over all linears and layer by layer.

    Args:
        weights: By linear, `[T, E]`.
        pieces: The texts of the tokens to show, the first ones.
        origin: What the text is, in words.
        left_out: Tokens behind those.
    """
    if not weights:
        return "No linear routes this text token by token."
    groups: dict[str, list[Tensor]] = {"all linears": []}
    width = max(one.shape[-1] for one in weights.values())
    for name, one in weights.items():
        padded = torch.nn.functional.pad(one, (0, width - one.shape[-1]))
        layer = layer_of(name)
        for group in ("all linears", name if layer is None else f"layer {layer}"):
            groups.setdefault(group, []).append(padded)
    listed: list[Matrix] = [
        [_rounded(row, 3) for row in torch.stack(own).mean(dim=0)[: len(pieces)]] for own in groups.values()
    ]
    return TokenRouting(origin, list(pieces), list(groups), listed, left_out)


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
