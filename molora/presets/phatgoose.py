from __future__ import annotations

from typing import Any


def phatgoose() -> dict[str, Any]:
    """Trained LoRAs, each with a gate trained on its own data; a token goes to the two gates it resembles most.

    PHATGOOSE (arXiv 2402.05859): `y = W0 x + Σ_{e∈top-k} w_e s_e B_e A_e x`, `w_e = p_e / Σ_{j∈top-k} p_j`,
    `p = softmax over all e of LN(x)·LN(v_e) / sqrt(n)`, LN without scale and shift, v_e the gate of `phatgoose-gate`.
    Authors' defaults: top 2, LoRAs of rank 16.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them; the
    gates come with them and are not trained.
    Differs from the authors' code: it ranks and mixes in one product instead of a loop over all experts; LoRAs keep
    their own scale (theirs is 1/r).
    """
    return {
        "router": "prototype",
        "freeze_router": True,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
    }
