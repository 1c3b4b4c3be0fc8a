from __future__ import annotations

from typing import Any


def static() -> dict[str, Any]:
    """A learned gate that ignores the input: a fixed mixture, exactly mergeable into the base model.

    `y = W0 x + Σ_e p_e (α/r) B_e A_e x` with `p = softmax(g)` and one learned vector `g` per linear, starting at equal
    shares. Because the gate is constant, `merge_and_unload()` is exact. From no paper.
    """
    return {
        "num_experts": 4,
        "r": 4,
        "lora_alpha": 16,
        "router": "static",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
