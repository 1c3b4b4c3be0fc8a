from __future__ import annotations

from typing import Any


def lorahub() -> dict[str, Any]:
    """Trained LoRAs with constant weights, searched on a few examples without gradients; their factors are mixed.

    LoraHub (arXiv 2307.13269): `y = W0 x + (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x`, w in [-1.5, 1.5] and the same
    everywhere, from 0, minimising the examples' loss plus 0.05 · mean |w| in about 40 evaluations. Merging is exact;
    all ranks must be equal.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them;
    `molora compose --shots` also searches w. Differs from the authors' code: CMA-ES instead of NGOpt; nothing is
    reloaded per step; each expert's scale goes with its B. Mixing factors adds cross terms that no adapter was trained
    with; `preset="psec"` has none.
    """
    return {
        "expert_layout": "factors",
        "router": "static",
        "freeze_router": True,
        "gate": "identity",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
