from __future__ import annotations

from typing import Any


def mixlora_dynamic() -> dict[str, Any]:
    """As `mixlora`, but a token takes as many experts as it needs to reach a share of the probability.

    MixLoRA (arXiv 2404.15159), top-p variant: experts in order of probability until their sum reaches p = 0.8, the one
    that crosses it included; weights are the probabilities as they are. Their sum is below 1, so the block's output is
    scaled down with it, also its frozen part: the authors' rule. `renormalize=True` avoids it.

    Differs from `molora.presets.mixlora` in selection and weights only. Theirs keeps the first expert whose sum is
    above p, ours the first at or above. In MoE-PEFT a "temperature" of this variant divides probabilities; it is not
    offered.
    """
    return {
        "num_experts": 8,
        "r": 16,
        "lora_alpha": 32,
        "expert_scope": "ffn",
        "router": "linear",
        "router_init": "normal",
        "router_init_range": 0.02,
        "gate": "softmax",
        "selection": "top_p",
        "top_p": 0.8,
        "weights": "probability",
        "renormalize": False,
        "routing_losses": {"load_balancing": 1e-3},
    }
