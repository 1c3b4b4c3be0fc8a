from __future__ import annotations

from typing import Any


def mor1e_pairs() -> dict[str, Any]:
    """As `mor1e`, but every pair of a row of A and a column of B is an expert: 32 of them from 4 rows and 8 columns.

    T-REX (arXiv 2404.08985, second version; `rank1_flex` in the code): with the gate g of `mor1e` laid out as
    `G [4, 8]`, `y = W0 x + σ(100φ) B z`, `z_j = Σ_i G_ij (A x)_i`. This is what the authors' launch script uses.

    Defaults: 32 experts and clusters, coefficients 32 and 4, all linears but the head. Scores are given as
    `expert_scores` `[B, 32]`: cosines of the prompt's embedding (theirs: nomic-embed-text-v1) with k-means centroids
    of the training set.
    No LoRA scale is applied, hence `lora_alpha=1`.
    Differs from the authors' code as `mor1e` does. `num_experts` must be the product of the two numbers in `r`.
    """
    return {
        "num_experts": 32,
        "r": [4, 8],
        "lora_alpha": 1,
        "expert_layout": "pairs",
        "router": "linear",
        "router_init": "zeros",
        "gate": "softmax",
        "selection": "dense",
        "weights": "blend",
        "renormalize": False,
        "blend_coefficients": [32.0, 4.0],
    }
