from __future__ import annotations

from typing import Any


def x_lora() -> dict[str, Any]:
    """Trained LoRAs, mixed by a classifier that reads the base model's last hidden state.

    X-LoRA (arXiv 2402.07148): `y = W0 x + Σ_e w_e s_e B_e A_e x`, `w = softmax(mlp(h))`, h from a pass of the base
    model without adapters; one classifier for all layers, dense, experts frozen, no loss.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them.
    Authors' defaults: classifier of one linear, inner size 2048 where it is deeper, dropout 0.2. Here it is the
    two-layer one; `router="linear"` with `router_bias=True` is the single one.
    Differs from the authors' code: one decision per prompt, from its last token's hidden state, kept while generating,
    so that the KV cache works (theirs decides per token and runs the whole prefix again for each); experts of unequal
    rank; `merge_and_unload()` refuses where PEFT's merges every adapter with weight 1; no dropout in the classifier;
    scalings per layer are `router_sharing="none"`.
    """
    return {
        "router": "mlp",
        "router_dim": 2048,
        "router_input": "base",
        "router_level": "sequence",
        "router_sharing": "model",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
