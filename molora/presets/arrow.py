from __future__ import annotations

from typing import Any


def arrow() -> dict[str, Any]:
    """Trained LoRAs, routed without any training: a token goes where its input is stretched most.

    Arrow (arXiv 2405.11157): `y = W0 x + Σ_{e∈top-k} w_e s_e B_e A_e x`, w the softmax over the kept of `|x·p_e| / T`,
    p_e the top right singular vector of `B_e A_e`. PEFT's defaults: top 3, T = 1.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them; the
    prototypes follow from them and are not trained.
    Differs from PEFT's: the singular vectors are exact, not from 15 power iterations; ranks and target modules may
    differ; nothing of size tokens x experts x outputs is built. x is not normalised, as in the code (its docstring
    says cosine). GenKnowSub, which subtracts a general adapter from the factors, is not offered. With fewer than
    three adapters composing keeps all of them.
    """
    return {
        "router": "arrow",
        "freeze_router": True,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 3,
        "weights": "selected_softmax",
        "renormalize": False,
    }
