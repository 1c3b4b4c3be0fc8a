from __future__ import annotations

from typing import Any


def molora() -> dict[str, Any]:
    """Dense soft routing: every expert counts, by its probability.

    MoLORA (arXiv 2309.05444): `y = W0 x + Σ_e p_e (α/r) B_e A_e x`, `p = softmax(W_g x)` in fp32, router drawn from
    N(0, 0.02), no balancing loss. Authors' scale is 16/r, their A is drawn from N(0, 0.02).

    Differs from the authors' code (T5X): theirs builds every expert's output before mixing them; the result is the
    same. Its optional top-k, not renormalised, is `selection="top_k"`. Its other method, MoV, scales activations and
    is no LoRA.
    """
    return {
        "num_experts": 10,
        "r": 4,
        "lora_alpha": 16,
        "init_A": "normal",
        "init_A_range": 0.02,
        "router": "linear",
        "router_init": "normal",
        "router_init_range": 0.02,
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
