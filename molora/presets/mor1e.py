from __future__ import annotations

from typing import Any


def mor1e() -> dict[str, Any]:
    """Rank-one experts, weighed by a router for the token and by how close the prompt is to clusters of the data.

    Intuition-MoR1E (arXiv 2404.08985; its second version is called T-REX), with `p = softmax(W x)` and scores c:
    `y = W0 x + σ(100φ) B(g ⊙ A x)`, `g = 32 m p + 4 (1 − m) c`, `m = σ(100θ)`; θ and φ are learned, per linear, from
    0. W starts at zero too, so that at first every expert has the gate 0.5 + 2c. No selection and no loss.

    Defaults: 32 experts and clusters, coefficients 32 and 4, all linears but the head. Scores are given as
    `expert_scores` `[B, 32]`: cosines of the prompt's embedding (theirs: nomic-embed-text-v1) with k-means centroids
    of the training set.
    No LoRA scale is applied, hence `lora_alpha=1`.
    Differs from the authors' code: scores belong to a call, theirs are set on every layer by a patched trainer; the
    adapter can be disabled, and a merge is refused where theirs ignores the gate. Their optional map from clusters to
    another number of experts is left to the caller.
    """
    return {
        "num_experts": 32,
        "r": 1,
        "lora_alpha": 1,
        "router": "linear",
        "router_init": "zeros",
        "gate": "softmax",
        "selection": "dense",
        "weights": "blend",
        "renormalize": False,
        "blend_coefficients": [32.0, 4.0],
    }
