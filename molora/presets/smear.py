from __future__ import annotations

from typing import Any


def smear() -> dict[str, Any]:
    """One bottleneck per sequence: experts are averaged factor by factor, by what the router reads of the prompt.

    SMEAR (arXiv 2306.03745), after a module with output z: `y = z + (Σ_e p_e B_e) silu(Σ_e p_e (A_e z + b_e))`,
    `p = softmax((c ⊙ LN(z̄)) · (d ⊙ LN(W_e)) + bias_e)` with z̄ the mean of z over the prompt's tokens, c and d from
    0.01. In training each p_e is zeroed with probability 0.1 and the others make up for it.

    The authors' adapters stand after the attention and feed-forward parts of a layer. Their outputs are those of the
    last linear, so that `target_modules` names these (o_proj and down_proj in LLaMA) with `expert_scope="linear"`,
    which works whatever a block returns. Authors' defaults: 8 experts (one per task) in T5-base, bottleneck 768 / 32 =
    24, everything from N(0, 0.01). There is no scale: keep `lora_alpha` equal to `r`.
    Differs from the authors' code: B starts at zero, so that training starts from the base model; the mean runs over
    the prompt (theirs in the decoder: what the caller hands in); no layer norms of the base model are trained.
    """
    return {
        "num_experts": 8,
        "r": 24,
        "lora_alpha": 24,
        "init_A": "normal",
        "init_A_range": 0.01,
        "expert_layout": "factors",
        "expert_activation": "silu",
        "expert_bias": True,
        "adapter_position": "after",
        "router": "normalized",
        "router_level": "sequence",
        "router_init": "normal",
        "router_init_range": 0.01,
        "gate": "softmax",
        "selection": "dense",
        "expert_dropout": 0.1,
        "weights": "probability",
        "renormalize": True,
    }
