from __future__ import annotations

from typing import Any


def adamoe() -> dict[str, Any]:
    """Experts that do nothing: a token that chooses them uses fewer real ones.

    AdaMoE (arXiv 2406.13233): `p = softmax(W x)` over n true and m null experts, top-k over all of them,
    `y = W0 x + Σ_{true e∈top-k} w_e (α/r) B_e A_e x`, `w_e = p_e / Σ_{true j∈top-k} p_j`; nothing if only nulls are
    chosen. The balancing loss gives every null expert the nulls' mean load, so that it does not balance among copies.

    Authors' example: 4 true and 5 null experts, top 4, loss 1e-3; rank, alpha and linears as MoLA's, from which their
    code is made. Differs from it: their experiment on Mixtral averages the null loads along the wrong axis, which
    changes nothing; here it is done. Their annealing of the coefficient is in no code; `routing_schedules` can do such
    things.
    """
    return {
        "num_experts": 4,
        "null_experts": 5,
        "r": 8,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 4,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }
