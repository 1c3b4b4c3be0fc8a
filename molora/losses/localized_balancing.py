"""Localized balancing: balance within each kind of sample, and tilt each kind towards a group of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.losses.tokens import as_linears


def localized_balancing(
    probabilities: Tensor,
    task_ids: Tensor,
    mask: Tensor | None = None,
    delta: float = 0.1,
    form: str = "cv2",
    groups: int = 2,
) -> Tensor:
    """LoRAMoE's localized balancing constraint of each linear (arXiv 2312.09979).

    `Z = I ∘ Q`, with `Q_mn` the mean probability that the real tokens of sequence m gave expert n, and `I_mn = 1 + δ`
    if expert n lies in the group of sequence m's kind, else `1 - δ`. The loss is the spread of all entries of Z:
    `var(Z) / mean(Z)²` as the authors' code has it (`form="cv2"`), or `var(Z) / mean(Z)` as the paper does
    (`"variance_over_mean"`); the variance is the unbiased one of their code. The experts are cut into `groups` equal
    parts in order, and kind g belongs to part g. Zero when Z is constant. With one sequence, all probability on one
    expert and δ = 0, `cv2` is E.

    The direction is not what its usual description says: constant Z means `Q ∝ 1 / I`, so a kind's own group ends up
    with *less* of its probability, 0.45 against 0.55 for δ = 0.1 and two groups. The labels are symmetric, so with
    two groups this only swaps their names; with more, every kind shuns one group. It is kept as published.

    Differs from the authors' code, which sums Q over padding too, and does not divide by the length, so that
    sequences of unequal length count as imbalance. Theirs has two groups, of which kind 1 marks the first.

    Args:
        probabilities: `[L, B, S, E]` for L linears or `[B, S, E]`.
        task_ids: The kind of each sequence, `[B]`, from 0 to `groups - 1`.
        mask: Boolean `[B, S]`, true for tokens that count; `None` for all.
        delta: δ, from 0 to 1.
        form: `"cv2"` or `"variance_over_mean"`.
        groups: Kinds of samples, and groups of experts.

    Returns:
        `[L]`, fp32: one value per linear, `[1]` for inputs without L. Zero if no token counts.

    Raises:
        MoloraError: If the experts cannot be cut into equal groups, or a kind has no group.
    """
    given, real = as_linears(probabilities, mask)
    num_experts = given.shape[-1]
    _check_groups(num_experts, task_ids, groups)
    lengths = real.sum(dim=-1)
    mean = (given * real.unsqueeze(-1)).sum(dim=-2) / lengths.clamp(min=1).unsqueeze(-1)  # [L, B, E]
    group = torch.arange(num_experts, device=given.device) // (num_experts // groups)
    scaled = mean * torch.where(task_ids.unsqueeze(-1) == group, 1 + delta, 1 - delta)
    counts = (lengths > 0).to(given.dtype).unsqueeze(-1)  # sequences of nothing but padding have no entries
    entries = counts.sum() * num_experts
    centre = (scaled * counts).sum(dim=(1, 2), keepdim=True) / entries.clamp(min=1)
    variance = ((scaled - centre).square() * counts).sum(dim=(1, 2)) / (entries - 1).clamp(min=1)
    centre = centre.reshape(-1)
    scale = centre.square() if form == "cv2" else centre
    return variance / scale.clamp(min=torch.finfo(given.dtype).tiny)


def _check_groups(num_experts: int, task_ids: Tensor, groups: int) -> None:
    if num_experts % groups:
        raise MoloraError(
            f"localized_balancing cuts the experts into {groups} equal groups, which {num_experts} experts do not "
            "allow; change `groups` or `num_experts`."
        )
    if bool(((task_ids < 0) | (task_ids >= groups)).any()):
        raise MoloraError(
            f"localized_balancing has {groups} groups of experts, so task_ids must lie in 0..{groups - 1}; got "
            f"{sorted(set(task_ids.tolist()))}. Give `groups` as the number of kinds, or relabel the task_ids column."
        )
