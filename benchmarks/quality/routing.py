"""What routers do with each task: sums over tokens, and the figures that follow from them.

Shapes: L linears of equally many experts, N tasks, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.routing.stacked import StackedRouting
from molora.routing.statistics import DEAD_BELOW

FIGURES = {
    "dead_experts": "experts with less than a tenth of an even share of selections",
    "largest_load": "largest share of selections of one expert",
    "dead_by_weight": "the same of gate weight",
    "largest_weight": "largest share of gate weight",
    "active_experts": "experts a token uses",
    "gate_entropy": "nats, of a token's mixing weights",
    "router_entropy": "nats, of its router's probabilities",
    "information_answers": "bits that the expert tells about the task, answer tokens",
    "information": "the same, all tokens",
}
"""Figures of a linear, and what they are. Tasks count equally in shares and information, tokens in the rest."""


@dataclass
class Sums:
    """Sums over tokens, from which every figure follows.

    Attributes:
        weights: Mixing weights, each token's made to sum to one, `[L, N, E]`.
        answers: The same over tokens of answers.
        selected: Times each expert was selected, `[L, N, E]`.
        tokens: Tokens, `[L, N]`.
        gate_entropy: Of the mixing weights, `[L, N]`.
        router_entropy: Of the router's probabilities, `[L, N]`.
    """

    weights: Tensor
    answers: Tensor
    selected: Tensor
    tokens: Tensor
    gate_entropy: Tensor
    router_entropy: Tensor

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(own + more for own, more in zip(vars(self).values(), vars(other).values(), strict=True)))

    def cpu(self) -> Sums:
        """The same on the CPU, in fp64."""
        return Sums(*(value.double().cpu() for value in vars(self).values()))


def sums_of(stack: StackedRouting, answers: Tensor, task: int, tasks: int) -> Sums:
    """Sum up the decisions about a batch of one task.

    Args:
        stack: The decisions.
        answers: Boolean `[B, S]`, true for tokens of answers.
        task: The task of the batch.
        tasks: N.
    """
    experts = stack.num_experts
    mask = torch.ones(stack.rows, device=answers.device) if stack.mask is None else stack.mask.float()
    spoken = answers_of_decisions(answers, stack.rows, stack.per_sequence).float() * mask
    gates = shares(stack.weights[..., :experts].float().clamp(min=0))
    selected = stack.selected[..., :experts].float()
    return Sums(
        _at(task, tasks, torch.einsum("lbse,bs->le", gates, mask)),
        _at(task, tasks, torch.einsum("lbse,bs->le", gates, spoken)),
        _at(task, tasks, torch.einsum("lbse,bs->le", selected, mask)),
        _at(task, tasks, mask.sum().expand(len(stack.layers))),
        _at(task, tasks, torch.einsum("lbs,bs->l", entropy(gates), mask)),
        _at(task, tasks, torch.einsum("lbs,bs->l", entropy(shares(stack.probabilities.clamp(min=0))), mask)),
    )


def answers_of_decisions(answers: Tensor, rows: torch.Size, per_sequence: bool) -> Tensor:
    """Which decisions are about tokens of answers, `[B, S']`, from `[B, S]`.

    One about a whole sequence is; several about a token stand side by side in its place.
    """
    if per_sequence:
        return torch.ones(rows, dtype=torch.bool, device=answers.device)
    return answers.repeat_interleave(rows[-1] // answers.shape[-1], dim=-1).reshape(rows)


def _at(task: int, tasks: int, values: Tensor) -> Tensor:
    """Values `[L, ...]` of one task as `[L, N, ...]`, zero for the others."""
    placed = values.new_zeros((values.shape[0], tasks, *values.shape[1:]))
    placed[:, task] = values
    return placed


def shares(values: Tensor) -> Tensor:
    """Values of at least 0 divided by their sum over the last dimension; zeros stay zeros."""
    total = values.sum(dim=-1, keepdim=True)
    return values / torch.where(total > 0, total, 1)


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def mutual_information(weights: Tensor) -> Tensor:
    """Bits that an expert tells about the task, every task counting the same: `[..., N, E]` to `[...]`.

    Not corrected for the bias of few tokens, which makes it larger.
    """
    of_task = shares(weights)
    return (entropy(of_task.mean(dim=-2)) - entropy(of_task).mean(dim=-1)) / math.log(2)


def load(counts: Tensor) -> Tensor:
    """Share of each expert, every task counting the same: `[..., N, E]` to `[..., E]`."""
    return shares(counts).mean(dim=-2)


def dead(of_experts: Tensor) -> Tensor:
    """Number of experts with less than a tenth of an even share: `[..., E]` to `[...]`."""
    return (of_experts < DEAD_BELOW / of_experts.shape[-1]).sum(dim=-1).to(of_experts.dtype)


def figures(sums: Sums) -> dict[str, Tensor]:
    """The `FIGURES`, each `[L]`."""
    selections, weight = load(sums.selected), load(sums.weights)
    tokens = sums.tokens.sum(dim=-1).clamp(min=1)
    return {
        "dead_experts": dead(selections),
        "largest_load": selections.max(dim=-1).values,
        "dead_by_weight": dead(weight),
        "largest_weight": weight.max(dim=-1).values,
        "active_experts": sums.selected.sum(dim=(-1, -2)) / tokens,
        "gate_entropy": sums.gate_entropy.sum(dim=-1) / tokens,
        "router_entropy": sums.router_entropy.sum(dim=-1) / tokens,
        "information_answers": mutual_information(sums.answers),
        "information": mutual_information(sums.weights),
    }


def summary(by_layers: Mapping[tuple[str, ...], Sums]) -> dict[str, dict[str, float]]:
    """Figures of each linear, and behind them their means under the name `mean`."""
    found: dict[str, dict[str, float]] = {}
    for layers, sums in by_layers.items():
        values = {name: value.tolist() for name, value in figures(sums.cpu()).items()}
        for at, layer in enumerate(layers):
            found[layer] = {name: round(value[at], 5) for name, value in values.items()}
    if found:
        found["mean"] = {name: sum(one[name] for one in found.values()) / len(found) for name in FIGURES}
    return found
