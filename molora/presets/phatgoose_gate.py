from __future__ import annotations

from typing import Any


def phatgoose_gate() -> dict[str, Any]:
    """First stage of `phatgoose`: one trained LoRA, frozen, learns a gate on its own data.

    PHATGOOSE (arXiv 2402.05859): `y = W0 x + sigmoid(v·x) s B A x`, v from zero, one per linear; only v is trained.
    Authors' defaults: 100 steps, AdamW, constant rate 5e-3 with 6 % warm-up.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze it.
    Made from one adapter; the result is then an input of `phatgoose` and `glider`. Without adapters it trains LoRA and
    gate together, which is not the paper's.
    """
    return {
        "num_experts": 1,
        "router": "linear",
        "router_init": "zeros",
        "gate": "sigmoid",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
