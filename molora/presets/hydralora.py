from __future__ import annotations

from typing import Any


def hydralora() -> dict[str, Any]:
    """One A for all experts, a B for each: what tasks share is learned once.

    HydraLoRA (arXiv 2404.19245): `y = W0 x + Σ_i ω_i(x) (α/r) B_i A x`, `ω = softmax(W x)` in fp32, dense, no loss.

    Authors' script: 4 heads, rank 4, alpha 32, dropout 0.05, gate/up/down projections. The paper's table has rank 8
    and about 3 heads, their number found by clustering the corpus, which is left to the user.
    Differs from the authors' code: `A x` is computed once, theirs once per head with a dropout mask each. The router
    reads x as in the code; the paper's "intermediate token representation" may mean `A x`. The multimodal variant, a
    router per block with hard top-1, is `router_sharing="block"`, `router_bias=True`, `selection="top_k"`, `top_k=1`,
    `weights="one"`, but without its straight-through gradient.
    """
    return {
        "num_experts": 4,
        "r": 4,
        "lora_alpha": 32,
        "expert_layout": "shared_A",
        "router": "linear",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
