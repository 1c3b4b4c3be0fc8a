from __future__ import annotations

from typing import Any


def mola() -> dict[str, Any]:
    """Top-2 routing with more experts in deeper layers.

    MoLA (arXiv 2402.08562), per linear, with `p = softmax(W_r x)` in fp32:
    `y = W0 x + Σ_{e∈top-2} w_e (α/r) B_e A_e x`, `w_e = p_e / Σ_{j∈top-2} p_j`. The list of expert numbers is spread
    over the depth: 2, 4, 6 and 8 experts in the first to last quarter of the layers (their best, "2468").

    Paper defaults: rank 8, alpha 16, dropout 0.05, all seven linears of a LLaMA layer.
    Differs from the authors' code: theirs takes a number per layer, also of k and r (`rank_pattern` here); the
    balancing loss of 1e-3 is on (theirs is off unless `obalance=True`), per linear (theirs pools a layer's routers),
    and leaves padding out. The paper draws A from a Gaussian, their code and we kaiming-uniform.
    """
    return {
        "num_experts": [2, 4, 6, 8],
        "r": 8,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }
