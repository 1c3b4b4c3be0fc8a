"""Statistics of routing: what share of tokens each expert gets, how sure the router is, how high the threshold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from molora.routing.stacked import StackedRouting

DEAD_BELOW = 0.1
"""An expert counts as dead when its load is below this fraction of an even share."""


@dataclass
class RoutingTally:
    """Sums over tokens, one row per linear, from which every statistic follows; tallies of one model can be added.

    Linears may have different numbers of experts. E is the largest, and columns a linear does not have are zero.

    Attributes:
        layers: Names of the linears, L of them.
        tokens: Tokens counted, `[L]`; sequences where the decision is about whole ones.
        selected: Times each expert was selected, `[L, E]`. Null experts are left out.
        nulls: Times a null expert was selected, `[L]`.
        num_experts: Experts of each linear, `[L]`; null experts and shared ones left out.
        entropy: Sum of the entropies of the tokens' shares of probability in nats, `[L]`.
        threshold: Sum of learned thresholds, `[L]`; zero where there is none.
    """

    layers: tuple[str, ...]
    tokens: Tensor
    selected: Tensor
    nulls: Tensor
    num_experts: Tensor
    entropy: Tensor
    threshold: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> RoutingTally:
        """Apply a function to every tensor, such as a move to another device."""
        return RoutingTally(self.layers, *(fn(column) for column in self._columns()))

    def __add__(self, other: RoutingTally) -> RoutingTally:
        # Not every pass runs every linear: layers may be dropped, or chosen by the data.
        return _from_rows(_add_rows([self, other]))

    def rows(self) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Each linear's name and its sums."""
        return zip(self.layers, zip(*self._columns(), strict=True), strict=True)

    def _columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self)[1:])

    def load(self) -> Tensor:
        """Share of each linear's selections that fell on each expert, `[L, E]`; rows sum to one."""
        return self.selected / self.selected.sum(dim=-1, keepdim=True).clamp(min=1)

    def metrics(self) -> dict[str, float]:
        """Averages over linears, ready for a log. One transfer from the device."""
        tokens = self.tokens.clamp(min=1)
        load = self.load()
        experts = self.num_experts.unsqueeze(-1)
        exists = torch.arange(load.shape[-1], device=load.device) < experts
        spread = (load * experts - 1).square() * exists
        kept = self.selected.sum(dim=-1)
        values = {
            "experts_per_token": kept / tokens,
            "load_max": load.max(dim=-1).values,
            "load_cv": (spread.sum(dim=-1) / self.num_experts).sqrt(),
            "dead_experts": ((load < DEAD_BELOW / experts) & exists).float().sum(dim=-1),
            "entropy": self.entropy / tokens,
            "threshold_mean": self.threshold / tokens,
            "null_share": self.nulls / (self.nulls + kept).clamp(min=1),
        }
        means = torch.stack([value.mean() for value in values.values()]).tolist()
        metrics = dict(zip(values, means, strict=True))
        if not metrics["null_share"]:
            del metrics["null_share"]  # most adapters have no null experts
        return metrics


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


@torch.no_grad()
def selection_counts(stack: StackedRouting) -> Tensor:
    """Times each expert was selected by real tokens, `[L, E + null_experts]`."""
    counts = stack.selected.float()
    if stack.mask is not None:
        counts = counts * stack.mask.unsqueeze(-1)
    return counts.sum(dim=(1, 2))


def _add_rows(tallies: Iterable[RoutingTally]) -> dict[str, tuple[Tensor, ...]]:
    sums: dict[str, tuple[Tensor, ...]] = {}
    for counted in tallies:
        for layer, row in counted.rows():
            before = sums.get(layer)
            sums[layer] = row if before is None else _add_row(before, row)
    return sums


def _add_row(before: tuple[Tensor, ...], row: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    tokens, selected, nulls, num_experts, entropy, threshold = zip(before, row, strict=True)
    width = max(len(counts) for counts in selected)
    kept = torch.stack([_padded(counts, width).to(tokens[0].device) for counts in selected]).sum(dim=0)
    total = [first + second.to(first.device) for first, second in (tokens, nulls, entropy, threshold)]
    return total[0], kept, total[1], num_experts[0], *total[2:]


def _from_rows(rows: dict[str, tuple[Tensor, ...]]) -> RoutingTally:
    width = max(len(row[1]) for row in rows.values())
    padded = [(row[0], _padded(row[1], width), *row[2:]) for row in rows.values()]
    device = padded[0][0].device  # a model may be laid out over several
    columns = ([value.to(device) for value in column] for column in zip(*padded, strict=True))
    return RoutingTally(tuple(rows), *(torch.stack(column) for column in columns))


def _padded(counts: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, width - len(counts)))


def _sums(stack: StackedRouting) -> tuple[Tensor, ...]:
    """The columns of a tally, summed over the tokens of each linear."""
    probabilities = stack.probabilities
    mask = probabilities.new_ones(stack.rows) if stack.mask is None else stack.mask.float()
    counts = selection_counts(stack)
    # Weights given from outside may be negative, and have no entropy.
    positive = probabilities.clamp(min=0)
    shares = positive / positive.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)
    entropy = -(torch.xlogy(shares, shares).sum(dim=-1) * mask).sum(dim=(1, 2))
    level = torch.zeros_like(entropy)
    if stack.threshold is not None:
        level = (stack.threshold.squeeze(-1) * mask).sum(dim=(1, 2))
    return (
        mask.sum().expand(len(stack.layers)),
        counts[:, : stack.num_experts],
        counts[:, stack.num_experts :].sum(dim=-1),
        torch.full_like(entropy, stack.num_experts),
        entropy,
        level,
    )
