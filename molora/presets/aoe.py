from __future__ import annotations

from typing import Any


def aoe() -> dict[str, Any]:
    """No router: the experts that react most to a token take it.

    Autonomy-of-Experts (arXiv 2501.13074) as a LoRA: `y = W0 x + Σ_{e∈top-k} p_e (α/r) B_e A_e x`,
    `p = softmax over e of ‖A_e x‖₂`, not renormalised. The norms cost nothing, as `A x` is needed anyway.

    The paper builds whole feed-forward experts for pre-training, so that 8 experts of rank 8, alpha 16 and top 2 are
    chosen here. Its optional balancing loss is `routing_losses={"load_balancing": 0.01}`.
    Differs: norms are those of LoRA's A, which start alike; for imported adapters, whose A differ in size, they would
    compare sizes. The released files are incomplete (the gate's weight is never initialised) and only served as
    reference.
    """
    return {
        "num_experts": 8,
        "r": 8,
        "lora_alpha": 16,
        "router": "activation_norm",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": False,
    }
