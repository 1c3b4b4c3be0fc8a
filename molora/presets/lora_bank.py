from __future__ import annotations

from typing import Any


def lora_bank() -> dict[str, Any]:
    """A few good and diverse LoRAs of a bank, chosen by examples of the task, then trained on with a router.

    "Leveraging Open Knowledge for Advancing Task Expertise in Large Language Models" (arXiv 2408.15915; code: Rocket):
    `y = W0 x + Σ_{e∈top-2} w_e s_e B_e A_e x`, `w_e = p_e / Σ_{j∈top-2} p_j`, `p = softmax(W x)`, over 4 experts,
    which go on learning; no loss. `molora compose --select 4 --shots FILE` does the choosing, `frozen_experts` freezes
    them instead.

    Authors' defaults: 4 adapters of rank 16, alpha 16. Made by `molora compose` or `MoLoraConfig.from_adapters`.
    Differs from the authors' code: every adapter keeps its scale, which theirs leaves out (right only where alpha is
    r); candidates are judged by the loss on the examples alone, theirs by accuracy as well. Their choice of training
    data by similarity to the examples is left to the user.
    """
    return {
        "num_experts": 4,
        "r": 16,
        "lora_alpha": 16,
        "frozen_experts": 0,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
    }
