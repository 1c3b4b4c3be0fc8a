from __future__ import annotations

from typing import Any


def perft() -> dict[str, Any]:
    """Routed LoRAs beside a mixture-of-experts block that the base model already has.

    PERFT-R (arXiv 2411.08212): `y = MoE(h) + Σ_{j∈top-k} p_j (α/r) B_j A_j h`, `p = softmax(W h)` in fp32 with a
    router of its own that reads the block's input h; an expert goes around the whole block, hidden size to hidden
    size. The paper renormalises the weights where the base model does so with its own: OLMoE does not, as here; set
    `renormalize=True` for Mixtral, and for models whose config has `norm_topk_prob=True`.

    Defaults: 4 experts of rank 16, alpha 32, top 2, dropout 0.05, balancing loss 1e-2, router from N(0, 0.02); from
    notes on a derived copy of the code. `target_modules` is the name of the block, `mlp` in OLMoE, Mixtral and
    Qwen-MoE as transformers 5 has them. Any module that maps hidden states to hidden states can be given.
    Differs from that copy: experts are weighed by their own router, where the copy uses the base router's
    probabilities, so that its router learns from its loss only; A is kaiming-uniform and B zero, where it has
    sqrt(2/r) and 1e-6.
    PERFT-S is `num_experts=1`, `router="none"`, `selection="dense"`; PERFT-D is `selection="dense"`, `weights="one"`.
    PERFT-E, inside the base model's experts, cannot be expressed. The original repository was not seen.
    """
    return {
        "num_experts": 4,
        "r": 16,
        "lora_alpha": 32,
        "expert_scope": "block",
        "target_modules": ["mlp"],
        "router": "linear",
        "router_init": "normal",
        "router_init_range": 0.02,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": False,
        "routing_losses": {"load_balancing": 1e-2},
    }
