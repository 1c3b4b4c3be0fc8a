"""How tasks and experts go together: sums over tokens of each task, and what an expert tells about the task.

Shapes: L linears of equally many experts, N tasks, E experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.routing.precision import full_precision
from molora.routing.stacked import StackedRouting


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
    router = shares(stack.probabilities.float().clamp(min=0))
    with full_precision(mask):  # 16 bits do not count beyond 256
        summed = (
            torch.einsum("lbse,bs->le", gates, mask),
            torch.einsum("lbse,bs->le", gates, spoken),
            torch.einsum("lbse,bs->le", selected, mask),
            mask.sum().expand(len(stack.layers)),
            torch.einsum("lbs,bs->l", entropy(gates), mask),
            torch.einsum("lbs,bs->l", entropy(router), mask),
        )
    return Sums(*(_at(task, tasks, value) for value in summed))


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
