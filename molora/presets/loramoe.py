from __future__ import annotations

from typing import Any


def loramoe() -> dict[str, Any]:
    """Dense routing whose balance depends on the kind of sample: one half of the experts for each of two kinds.

    LoRAMoE (arXiv 2312.09979): `y = W0 x + Σ_i ω_i(x) (α/r) B_i A_i x`, `ω = softmax(W x)` in fp32, a router per
    linear. Training adds the localized balancing constraint `0.1 · CV²(I ∘ Q)`, with `Q` the summed probability of a
    sample's tokens and `I = 1 ± δ` by whether an expert belongs to the sample's kind, which `task_ids` 0 and 1 say.

    Paper defaults: 6 experts (3 + 3) of rank 4, alpha 32, δ = 0.1, dropout 0.05, gate/up/down projections.
    Differs from the authors' code: padding is left out of `Q`; one dropout mask serves all experts; the loss is a mean
    over linears, theirs a sum, and their script trains with it off. The paper divides by the mean, the code and we by
    its square; `form: variance_over_mean` is the paper's. As published, the constraint gives a kind's own group the
    smaller share (0.45 to 0.55 at δ = 0.1). Other models' linears go into `target_modules`.
    """
    return {
        "num_experts": 6,
        "r": 4,
        "lora_alpha": 32,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "router": "linear",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
        "routing_losses": {"localized_balancing": {"coefficient": 0.1, "delta": 0.1}},
    }
