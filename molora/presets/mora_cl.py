from __future__ import annotations

from typing import Any


def mora_cl() -> dict[str, Any]:
    """Continual learning with ranks that activate themselves: old ranks are frozen, each task adds new ones.

    MoRA for continual learning (arXiv 2506.21035, "Little By Little"; v3: MoRAM), over the ranks of all tasks, with
    `s = A x / ‖A x‖₂`: `y = W0 x + Σ_{i∈top-k} w_i b_i (a_i x)`, `w = softmax(s / τ)`; at inference only ranks with
    `s_i ≥ δ`. There is no router to train and no loss. Not the high-rank MoRA of kongds.

    Each task: `add_experts(n, freeze_existing=True)`. As the norm and the softmax run over all ranks, growing changes
    the weights of the old ones. δ is `min_logit`, τ is `temperature`.
    Unverified, as there is no code and only a summary was read: k, τ, δ (here 8, 1, none), the ranks per task (16),
    the initialisation (here LoRA's) and whether weights are renormalised after masking (here not). `lora_alpha=16`
    makes even weights over 16 ranks count as much as a LoRA whose alpha is its rank.
    """
    return {
        "num_experts": 16,
        "r": 1,
        "lora_alpha": 16,
        "router": "unit_activation",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 8,
        "weights": "probability",
        "renormalize": False,
    }
