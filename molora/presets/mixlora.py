from __future__ import annotations

from typing import Any


def mixlora() -> dict[str, Any]:
    """Experts that span the feed-forward block, one router for each block; attention gets a plain LoRA.

    MixLoRA (arXiv 2404.15159), with `p = softmax(W_g h)` in fp32 of the block's input h: `y = Σ_{e∈top-k} w_e E_e(h)`,
    `w_e = p_e / Σ_{j∈top-k} p_j`, `E_e(h) = W2' (act(W1' h) ⊙ W3' h)`, where `W' = W + (α/r) B_e A_e` for each of the
    three.
    Linears outside the block, such as q/k/v/o, get a plain LoRA of the same rank.

    Paper defaults: 8 experts of rank 16, alpha 32, top 2, router from N(0, 0.02), all seven linears, dropout 0.05. The
    balancing coefficient is 1e-3 in the code and the best of the paper's ablation, 1e-2 in its text.
    Differs from the authors' code: the frozen matrices are multiplied once, not once per expert, with the same result
    (W2 is linear, so it is applied to the mixed hidden state); dropout may be 0 and stops at inference, where mixlora
    0.2.3 keeps it on; the balancing loss is averaged over blocks where theirs pools all layers first. Not offered:
    DoRA per expert (MixDoRA), and the `switch` variant, whose released inference path skips the block.
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
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }
