"""Gate contrastive: route a sequence the same way in two views of it, or like others of its task."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.losses.gram import mean_of_pairs, unit
from molora.losses.tokens import as_linears, shares
from molora.routing.precision import full_precision


def gate_contrastive(
    probabilities: Tensor,
    mask: Tensor | None = None,
    view: Tensor | None = None,
    task_ids: Tensor | None = None,
    temperature: float = 0.1,
) -> Tensor:
    """A contrastive loss on the gates of each linear, sequence against sequence, after AW-MoE.

    With `g_b` the mean share of probability over the real tokens of sequence b, and `s(a, b) = cos(a, b) / τ`:

    - `view`: `L = mean_b( -log( exp(s(g_b, g'_b)) / Σ_c exp(s(g_b, g'_c)) ) )`, with `g'` of the second view. About 0
      when each sequence is routed the same in both views and unlike the others, `log B` when all are routed alike.
    - `task_ids`: `L = mean_b( mean_p( -log( exp(s(g_b, g_p)) / Σ_{c ≠ b} exp(s(g_b, g_c)) ) ) )` over the other
      sequences p of b's task (SupCon, arXiv 2004.11362); sequences without such do not count. `log(B - 1)` when all
      are routed alike, and `log` of the number of positives at best.

    The formula is molora's own. Only the abstract of AW-MoE (Gong et al., "Attention Weighted Mixture of Experts with
    Contrastive Learning", arXiv 2306.05011) was at hand: it masks behaviour sequences for a second view and contrasts
    the output of the gate network. Coefficients of 0.01 to 0.1 are ours too; begin with 0.05.

    Args:
        probabilities: `[L, B, S, E]` for L linears or `[B, S, E]`.
        mask: Boolean `[B, S]`, true for tokens that count; `None` for all.
        view: Probabilities by a second view of the features; same shape.
        task_ids: The task of each sequence, `[B]`; any integers.
        temperature: τ.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero for fewer than two sequences.

    Raises:
        MoloraError: If neither or both of `view` and `task_ids` are given.
    """
    if (view is None) == (task_ids is None):
        raise MoloraError(
            "gate_contrastive compares the gates of sequences with those of a second view, or by task; got "
            f"{'neither' if view is None else 'both'}. Give `view` or `task_ids`."
        )
    gates, real = _pooled(probabilities, mask)  # [L, B, E], [B]
    others = gates if view is None else _pooled(view, mask)[0]
    with full_precision(gates):
        scores = unit(gates) @ unit(others).mT / temperature  # [L, B, B]
    same = torch.eye(len(real), dtype=torch.bool, device=real.device)
    rivals = real & real.unsqueeze(-1)
    positive = rivals & same
    if task_ids is not None:
        rivals = rivals & ~same
        positive = rivals & (task_ids == task_ids.unsqueeze(-1))
    # A row without rivals is left whole: the logsumexp of nothing has a gradient of NaN.
    shut = ~rivals & rivals.any(dim=-1, keepdim=True)
    lost = torch.logsumexp(scores.masked_fill(shut, -torch.inf), dim=-1, keepdim=True) - scores
    weights = positive / positive.sum(dim=-1, keepdim=True).clamp(min=1)
    return mean_of_pairs(lost, weights.expand_as(lost))


def _pooled(probabilities: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean shares of each sequence, `[L, B, E]`, and which sequences have a real token, `[B]`."""
    given, real = as_linears(shares(probabilities), mask)
    lengths = real.sum(dim=-1)
    mean = (given * real.unsqueeze(-1)).sum(dim=-2) / lengths.clamp(min=1).unsqueeze(-1)
    return mean, lengths > 0
