"""Routers that come from the adapters themselves: Arrow's prototypes."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def arrow_prototype(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Return the direction of the input that an expert amplifies most: the top right singular vector of `B A`.

    Arrow (arXiv 2405.11157). Exact, and never forms `[out, in]`: with `B = Q_b R_b` and `Aᵀ = Q_a R_a` the singular
    vectors of `B A = Q_b (R_b R_aᵀ) Q_aᵀ` are those of the small `[r, r]` middle. PEFT's Arrow does 15 power
    iterations, which two nearly equal singular values leave far from converged.

    Args:
        lora_a: A `[r, in]`.
        lora_b: B `[out, r]`.

    Returns:
        A unit vector `[in]` in fp64, whose largest entry is positive, as its sign means nothing. Zeros for an expert
        that computes nothing: its similarity with every token is then the smallest there is.
    """
    q_a, r_a = torch.linalg.qr(lora_a.double().T)
    r_b = torch.linalg.qr(lora_b.double(), mode="r").R
    _, singular, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    if singular.numel() == 0 or singular[0] == 0:
        return torch.zeros(lora_a.shape[1], dtype=torch.double)
    vector = q_a @ right[0]
    return vector * vector[vector.abs().argmax()].sign()
