from __future__ import annotations

from typing import Any


def adamole() -> dict[str, Any]:
    """Adaptive thresholds: each token keeps the experts whose probability exceeds its own learned threshold.

    AdaMoLE (arXiv 2405.00361), per linear, with `p = softmax(W_g x)` and `τ = τ_max · sigmoid(w·x + b)`:
    `y = W0 x + Σ_e w_e (α/r) B_e A_e x`, `w_e = (p_e − τ)·1[p_e ≥ τ] / Σ_j (p_j − τ)·1[p_j ≥ τ]`.

    Paper defaults: 8 experts of rank 4, alpha 16, `τ_max = 1/E`, q/k/v/o projections, dropout 0.05.
    Differs from the authors' code: the softmax is in fp32; one dropout mask serves all experts; the balancing loss is
    Switch's on probabilities averaged over linears (theirs uses `p − τ`, summed over linears, which mostly pushes the
    threshold up). Dropout is left at 0; set `lora_dropout=0.05` and the paper's `target_modules` to follow it fully.
    """
    return {
        "num_experts": 8,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "adaptive_threshold",
        "weights": "probability_minus_threshold",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }
