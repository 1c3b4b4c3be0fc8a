from __future__ import annotations

from typing import Any


def smora() -> dict[str, Any]:
    """Every rank is an expert, chosen by a sigmoid router and balanced by a bias instead of a loss.

    SMoRA (arXiv 2501.15103), with `u = sigmoid(W x) + β`: `y = W0 x + (α/k) Σ_{i∈top-k of u} g_i b_i (a_i x)`,
    `g_i = k u_i / Σ_{j∈top-k} u_j`. The factors k cancel, which leaves `α u_i / Σ u`, here `lora_alpha=16` with `r=1`.
    After each step `β_i += 1e-5 · sign(mean load − load_i)`, without a gradient.

    Authors' defaults: 64 ranks, 8 chosen, alpha 16, all linears. Blocks of ranks are `r=2`, `num_experts=32` and so
    on; `lora_alpha / r` is the scale, so multiply alpha too.
    As released, the bias is inside the gate's value, other than in DeepSeek's rule; `weights="probability"` is that
    one.
    Differs from the authors' code: β moves once per optimizer step and never in `forward`; the ranks that were not
    chosen are multiplied by zero, where theirs has kernels of its own (not complete in their repository) that gather.
    """
    return {
        "num_experts": 64,
        "r": 1,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "sigmoid",
        "selection": "top_k",
        "top_k": 8,
        "weights": "biased_probability",
        "renormalize": True,
        "balance_bias_rate": 1e-5,
    }
