from __future__ import annotations

from typing import Any


def psec() -> dict[str, Any]:
    """A library of trained LoRAs, reused with free weights while a new one is learned.

    PSEC (arXiv 2502.05932): `y = W0 x + Σ_e w_e s_e B_e A_e x`, w learned without a constraint, old LoRAs frozen.
    Merging is exact.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them;
    `num_experts` one above the number of adapters adds the new LoRA, of rank `r`.
    Differs from the authors' (JAX, diffusion policies): w is a constant per linear, theirs comes from a network that
    reads the agent's state and serves all layers; `router="mlp"` with `gate="identity"` and `router_sharing="model"`
    is closest to it. Theirs holds exactly two LoRAs.
    """
    return {
        "r": 8,
        "lora_alpha": 8,
        "router": "static",
        "router_init": "ones",
        "gate": "identity",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
