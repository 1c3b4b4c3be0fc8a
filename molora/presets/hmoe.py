from __future__ import annotations

from typing import Any


def hmoe() -> dict[str, Any]:
    """Experts of unequal rank, as many per token as it needs, with a penalty on using large ones.

    HMoE (arXiv 2408.10681) as a LoRA, with `p = softmax(W x)`: experts in order of probability until they hold p =
    0.6; `y = W0 x + Σ_e w_e (α/r_e) B_e A_e x`, `w_e = p_e / Σ_kept p`. Training adds `0.1 · E Σ_e M_e P_e` with `M_e`
    the use of an expert times its size, and 3e-2 times the router's entropy, which keeps the number of experts from
    growing.

    The paper's sizes grow in equal steps to about 2.5 times the smallest; here ranks 4 to 11. With another
    `num_experts`, give `r` as a list of that length. Alpha 16 is chosen here.
    Unverified, from notes: whether top-p weights are renormalised (here they are), the sign of the entropy term (here
    minimised, as its purpose demands) and the units of a size (here rank over mean rank). No code was read.
    """
    return {
        "num_experts": 8,
        "r": [4, 5, 6, 7, 8, 9, 10, 11],
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_p",
        "top_p": 0.6,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"parameter_penalty": 0.1, "router_entropy": 3e-2},
    }
