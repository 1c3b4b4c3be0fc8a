from __future__ import annotations

from typing import Any


def moelora() -> dict[str, Any]:
    """The task decides: one mixture of experts per task id, the same in all layers.

    MOELoRA (arXiv 2310.18339): `y = W0 x + Σ_i ω_i (α/R) B_i A_i x`, `ω = softmax(W emb[task])`, dense, with one
    embedding and one W for all layers (the paper's variant, "S" in the code). R is the rank of all experts together.

    Authors' defaults: 8 experts of rank 2 (16 in all), alpha 32, embeddings of size 64, A from N(0, 0.01), dropout
    0.1.
    Needs `task_ids`; `num_tasks=16` is that of their data. `router_sharing="none"` is their other variant.
    Differs from the authors' code: any model and batch-first inputs (theirs fits ChatGLM-6B), a missing or unknown
    task id is an error. Several ids per sample, averaged there, are not offered.
    """
    return {
        "num_experts": 8,
        "r": 2,
        "lora_alpha": 32,
        "scale_by": "total",
        "init_A": "normal",
        "init_A_range": 0.01,
        "router": "task",
        "router_dim": 64,
        "num_tasks": 16,
        "router_sharing": "model",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
