from __future__ import annotations

from typing import Any


def self_moe() -> dict[str, Any]:
    """LoRAs trained on data the model wrote itself, with one router trained afterwards, whose weight all layers share.

    Self-MoE, MiXSE (arXiv 2406.12034): `y = W0 x + Σ_{e∈top-k} p_e s_e B_e A_e x`, `p = softmax(W x)`, W the same in
    all linears.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them; the
    router is trained on the data of all experts. `router_sharing="weights"` shares W among linears of equal input
    size.
    Unverified, as no code was seen: k (here 1, not renormalised), the experts' rank and alpha, and what is shared
    where inputs differ in size. Writing the data is left to the user.
    """
    return {
        "router": "linear",
        "router_sharing": "weights",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 1,
        "weights": "probability",
        "renormalize": False,
    }
