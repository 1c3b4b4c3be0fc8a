from __future__ import annotations

from typing import Any


def recommended() -> dict[str, Any]:
    """Two shared experts, and top-2 routing that starts from data: what molora recommends where no paper is repeated.

    `y = W0 x + Σ_{e∈top-2} w_e (α/r) B_e A_e x + Σ_{e shared} (α/r) B_e A_e x`, `w_e = p_e / Σ_{j∈top-2} p_j`,
    `p = softmax(W (x − μ)/σ + b)`, top-2 of `p + β`. Mean μ and deviation σ of each feature, W and b come from one
    pass over training rows before the first step; β is the balancing bias, and there is no loss. From no paper.

    W tells from one token which kind of text it is in: clusters of rows, found without labels, and their linear
    discriminant, scaled so that the largest p is 0.7 on average; b evens loads out. W and b are trained, μ and σ stay.
    β moves by 0.003 a step in molora's trainers (loss-free balancing, arXiv 2408.15664). With other trainers call
    `molora.calibrate_routers` first. Shared experts learn from every token: without them a single task is learnt less
    well than by a LoRA. α/r is 4, as a token uses half of the rank: so a learning rate that suits a LoRA suits the
    mixture too. docs/routers.md has the measurements that each choice rests on.
    """
    return {
        "num_experts": 6,
        "shared_experts": 2,
        "r": 8,
        "lora_alpha": 32,
        "router": "linear",
        "router_bias": True,
        "router_norm": "standardize",
        "router_init": "clusters",
        "router_confidence": 0.7,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "balance_bias_rate": 0.003,
        "weights": "probability",
        "renormalize": True,
    }
