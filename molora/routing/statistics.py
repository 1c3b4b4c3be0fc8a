"""Statistics of routing: what share of tokens each expert gets, how sure the router is, how high the threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.routing.record import StackedRouting

DEAD_BELOW = 0.1
"""An expert counts as dead when its load is below this fraction of an even share."""


@dataclass
class RoutingTally:
    """Sums over tokens, one row per linear, from which every statistic follows; tallies of one model can be added.

    Attributes:
        layers: Names of the linears, L of them.
        tokens: Tokens counted, `[L]`.
        selected: Times each expert was selected, `[L, E]`.
        entropy: Sum of the entropies of the tokens' probabilities in nats, `[L]`.
        threshold: Sum of learned thresholds, `[L]`; zero where there is none.
    """

    layers: tuple[str, ...]
    tokens: Tensor
    selected: Tensor
    entropy: Tensor
    threshold: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> RoutingTally:
        """Apply a function to every tensor, such as a sum over processes."""
        return RoutingTally(self.layers, fn(self.tokens), fn(self.selected), fn(self.entropy), fn(self.threshold))

    def __add__(self, other: RoutingTally) -> RoutingTally:
        # Not every pass runs every linear: layers may be dropped, or chosen by the data.
        rows = _add_rows([self, other])
        return _from_rows(rows)

    def rows(self) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Each linear's name and its sums."""
        columns = (self.tokens, self.selected, self.entropy, self.threshold)
        return zip(self.layers, zip(*columns, strict=True), strict=True)

    def load(self) -> Tensor:
        """Share of each linear's selections that fell on each expert, `[L, E]`; rows sum to one."""
        return self.selected / self.selected.sum(dim=-1, keepdim=True).clamp(min=1)

    def metrics(self) -> dict[str, float]:
        """Averages over linears, ready for a log. One transfer from the device."""
        tokens = self.tokens.clamp(min=1)
        load = self.load()
        num_experts = load.shape[-1]
        values = torch.stack(
            [
                (self.selected.sum(dim=-1) / tokens).mean(),
                load.max(dim=-1).values.mean(),
                (load * num_experts - 1).square().mean(dim=-1).sqrt().mean(),
                (load < DEAD_BELOW / num_experts).float().sum(dim=-1).mean(),
                (self.entropy / tokens).mean(),
                (self.threshold / tokens).mean(),
            ]
        ).tolist()
        names = ("experts_per_token", "load_max", "load_cv", "dead_experts", "router_entropy", "threshold_mean")
        return dict(zip(names, values, strict=True))


@torch.no_grad()
def tally(stacks: Iterable[StackedRouting]) -> RoutingTally | None:
    """Sum up recorded decisions; several about one linear are added.

    Args:
        stacks: Decisions of one adapter.

    Returns:
        The tally, or `None` if there is nothing to count.
    """
    rows = _add_rows(RoutingTally(stack.layers, *_sums(stack)) for stack in stacks)
    return _from_rows(rows) if rows else None


def _add_rows(tallies: Iterable[RoutingTally]) -> dict[str, tuple[Tensor, ...]]:
    sums: dict[str, tuple[Tensor, ...]] = {}
    for counted in tallies:
        for layer, row in counted.rows():
            before = sums.get(layer)
            sums[layer] = row if before is None else tuple(a + b for a, b in zip(before, row, strict=True))
    return sums


def _from_rows(rows: dict[str, tuple[Tensor, ...]]) -> RoutingTally:
    tokens, selected, entropy, threshold = (torch.stack(column) for column in zip(*rows.values(), strict=True))
    return RoutingTally(tuple(rows), tokens, selected, entropy, threshold)


def _sums(stack: StackedRouting) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, selections, entropy and threshold summed over the tokens of each linear."""
    probabilities = stack.probabilities
    mask = probabilities.new_ones(probabilities.shape[1:3]) if stack.mask is None else stack.mask.float()
    selected = (stack.selected * mask.unsqueeze(-1)).sum(dim=(1, 2))
    entropy = -(torch.xlogy(probabilities, probabilities).sum(dim=-1) * mask).sum(dim=(1, 2))
    tokens = mask.sum().expand(len(stack.layers))
    level = torch.zeros_like(entropy)
    if stack.threshold is not None:
        level = (stack.threshold.squeeze(-1) * mask).sum(dim=(1, 2))
    return tokens, selected, entropy, level
