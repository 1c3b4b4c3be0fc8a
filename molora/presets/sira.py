from __future__ import annotations

from typing import Any


def sira() -> dict[str, Any]:
    """Top-k routing with limited room per expert and dropout of experts, both in training only.

    SiRA (arXiv 2311.09179): `y = W0 x + Σ_e G(x)_e (α/r) B_e A_e x`, `G = TopK(Dropout(softmax(W_g x)))`; an expert
    takes a limited number of a batch's tokens, later ones do without it. A balancing loss as in GShard, of the first
    choices.

    Unverified, as no code and no full text was at hand: everything but top-k, the capacity limit and the dropout on
    the gate. 16 experts of rank 4 and top 4 are from memory; that weights are renormalised, alpha 16, capacity 1.25,
    dropout 0.1 and the loss's coefficient are chosen here.
    """
    return {
        "num_experts": 16,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 4,
        "weights": "probability",
        "renormalize": True,
        "expert_dropout": 0.1,
        "capacity_factor": 1.25,
        "routing_losses": {"load_balancing": {"coefficient": 1e-3, "count": "first"}},
    }
