from __future__ import annotations

from typing import Any


def glider() -> dict[str, Any]:
    """As `phatgoose`, with what is known of the whole prompt added to every token's logits.

    Glider (arXiv 2410.07172): logits `LN(x)·LN(v_e) / sqrt(n) + s · c_e`, softmax over all, top 2, renormalised; c_e
    the cosine of the query's embedding with that of expert e, given as `expert_scores` `[B, E]`. The authors let a
    language model write an instruction for the query and embed it (nomic).

    Authors' values: s = 3 on held-out data, 100 on held-in, which is close to choosing adapters per prompt.

    Made by `molora compose` or `MoLoraConfig.from_adapters`, which set the number of experts and freeze them; the
    gates of `phatgoose-gate` come with them and are not trained. Differs from the authors' code: gates are normalised
    in the layer, theirs once after training; LoRAs keep their own scale. Nothing writes or embeds instructions here.
    """
    return {
        "router": "prototype",
        "freeze_router": True,
        "score_weight": 3.0,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
    }
