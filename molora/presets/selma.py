from __future__ import annotations

from typing import Any


def selma() -> dict[str, Any]:
    """The mean of trained LoRAs: nothing to train, exactly mergeable.

    SELMA (arXiv 2403.06952): `y = W0 x + Σ_e (1/E) s_e B_e A_e x`, the mean of the experts' deltas, not of their
    factors. The authors train one LoRA per skill on data a language model wrote, for text-to-image models (rank 128).

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them; the
    shares stay equal.
    Differs from the authors' code in nothing; theirs is a call of diffusers' `set_adapters`.
    """
    return {
        "router": "static",
        "freeze_router": True,
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
