"""Mutual information: let the choice of experts tell the tasks apart."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.losses.tokens import as_linears, entropy, shares
from molora.routing.precision import full_precision


def mutual_information(probabilities: Tensor, task_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The negative mutual information of task and expert of each linear (Mod-Squad, arXiv 2212.08066; BECoTTA).

    `L = -Σ_ke J_ke log(J_ke / (J_k J_e))`, in nats, with `J_ke` the mean share of probability that tokens of task k
    gave expert e, over all tokens of the micro-batch; `J_k` and `J_e` are its margins. Zero when every task uses the
    experts alike, `-log K` when each of K tasks has experts of its own. Minimising it both balances the experts and
    makes each task choose few.

    Needs several tasks in a micro-batch: with one task it is zero without a gradient, and with few tokens it is
    biased towards dependence. Differs from Mod-Squad, which gives every task the same weight instead of that of its
    tokens and adds 1e-4 to each probability. BECoTTA's (arXiv 2402.08712) released code detaches the routing, so its
    loss trains nothing; this is the paper's.

    Args:
        probabilities: `[L, B, S, E]` for L linears or `[B, S, E]`.
        task_ids: The task of each sequence, `[B]`; any integers.
        mask: Boolean `[B, S]`, true for tokens that count; `None` for all.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.
    """
    given, real = as_linears(shares(probabilities), mask)
    by_sequence = (given * real.unsqueeze(-1)).sum(dim=-2)  # [L, B, E]
    # A task's row is that of its first sequence: counting the tasks would wait for the device.
    same = task_ids.unsqueeze(0) == task_ids.unsqueeze(1)
    first = torch.nn.functional.one_hot(same.to(torch.int8).argmax(dim=-1), len(task_ids)).to(given.dtype)
    with full_precision(given):
        joint = first.T @ by_sequence / real.sum().clamp(min=1)
    return entropy(joint.flatten(1)) - entropy(joint.sum(dim=-1)) - entropy(joint.sum(dim=-2))
