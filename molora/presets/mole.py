from __future__ import annotations

from typing import Any


def mole() -> dict[str, Any]:
    """Top-k routing: each token mixes its two most probable experts, weights summing to one.

    MoLE, the baseline of AdaMoLE (arXiv 2405.00361), with `p = softmax(W_g x)`:
    `y = W0 x + Σ_{e∈top-k} w_e (α/r) B_e A_e x`, `w_e = p_e / Σ_{j∈top-k} p_j`.

    Defaults as `adamole`, with `top_k=2`. The paper's other baseline, a constant threshold, is
    `selection="threshold"`.
    """
    return {
        "num_experts": 8,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }
