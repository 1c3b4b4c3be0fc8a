from __future__ import annotations

from typing import Any


def lora() -> dict[str, Any]:
    """One expert and no router: numerically PEFT's LoRA, as the baseline to compare with.

    LoRA (arXiv 2106.09685): `y = W0 x + (α/r) B A x`. Rank and alpha are PEFT's defaults, 8 and 8.
    """
    return {
        "num_experts": 1,
        "r": 8,
        "lora_alpha": 8,
        "router": "none",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
