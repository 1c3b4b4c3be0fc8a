from __future__ import annotations

from typing import Any


def flylora() -> dict[str, Any]:
    """Every rank is an expert, and a frozen sparse random A is the router: a rank is chosen by its own activation.

    FlyLoRA (arXiv 2510.08396): `y = W0 x + (α/R) Σ_{i∈top-k of |A x + d|} b_i (a_i x)`; only B is trained. Each row of
    A has a share k/R of entries other than zero, from N(0, 1/R²). After each step
    `d_i += u · sign(mean load − load_i)`.

    Authors' defaults: R = 32, k = 8, alpha 64, u = 1e-3 in the script (1e-2 in the config), all seven linears.
    Differs from the authors' code: ranks are chosen by absolute value as in the paper and their minimal version, where
    their PEFT fork takes the largest signed value (`selection="top_k"`); d moves once per optimizer step in training,
    theirs in every forward pass, at evaluation too and twice under gradient checkpointing; the gradient to x goes
    through A, which theirs cuts in full precision. Adapters of several tasks are to be merged by their products, not
    factors.
    """
    return {
        "num_experts": 32,
        "r": 1,
        "lora_alpha": 64,
        "scale_by": "total",
        "init_A": "sparse_normal",
        "freeze_A": True,
        "router": "activation",
        "gate": "identity",
        "selection": "top_k_magnitude",
        "top_k": 8,
        "weights": "one",
        "renormalize": False,
        "balance_bias_rate": 1e-3,
    }
