from __future__ import annotations

from typing import Any


def mocle() -> dict[str, Any]:
    """The cluster of the instruction decides: one expert for it, and a universal expert for what it leaves.

    MoCLE (arXiv 2312.12379): `y = W0 x + (α/r) (g B_e A_e x + (1 − g) B_u A_u x)`, e and g being the largest of
    `softmax((W emb[cluster] + b + noise) / T)`, noise from N(0, 0.1²) in training, u the universal expert.

    Authors' defaults: 4 experts of rank 8, alpha 32, dropout 0.1, T = 0.05, embeddings of size 384, 16 or 64 clusters,
    q and v projections. Needs `task_ids`: k-means clusters of the instruction's sentence embedding, found beforehand.
    Differs from the authors' code, of which only inference is released: the expert counts g once, theirs g²; clusters
    are given, where theirs runs k-means in every linear of every pass; softmax in fp32, theirs in fp16.
    """
    return {
        "num_experts": 4,
        "shared_experts": 1,
        "shared_weight": "remainder",
        "r": 8,
        "lora_alpha": 32,
        "router": "task",
        "router_dim": 384,
        "router_bias": True,
        "num_tasks": 16,
        "gate": "softmax",
        "temperature": 0.05,
        "router_noise": 0.1,
        "selection": "top_k",
        "top_k": 1,
        "weights": "probability",
        "renormalize": False,
    }
