from __future__ import annotations

from typing import Any


def pmoe() -> dict[str, Any]:
    """Continual learning: experts in the deep layers only, all of them chosen by one router, one more with each task.

    PMoE (arXiv 2407.21571): shallow layers keep general knowledge and are not adapted; in the deeper half
    `y = W0 x + Σ_{e∈top-k} w_e (α/r) B_e A_e x`, with one decision per token for all deep layers, made where they
    begin. For the next task, `add_experts(1, freeze_existing=True)`.

    Unverified, as only the abstract was seen and there is no code: gate, selection and scale. Softmax, top 2
    renormalised, 4 experts of rank 8, alpha 16 and the deeper half are chosen here.
    """
    return {
        "num_experts": 4,
        "r": 8,
        "lora_alpha": 16,
        "depth_range": [0.5, 1.0],
        "router": "linear",
        "router_sharing": "model",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
    }
