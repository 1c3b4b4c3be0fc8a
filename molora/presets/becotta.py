from __future__ import annotations

from typing import Any


def becotta() -> dict[str, Any]:
    """Bottleneck experts after each layer, with a router of its own for each domain.

    BECoTTA (arXiv 2402.08712), after a layer with output z: `y = z + Σ_{i∈top-k} G_i(z) B_i gelu(A_i z)`, with G the
    softmax over the kept of `W_d z + ε · softplus(N_d z)`, d the domain of the sequence and ε noise in training.
    Training adds -5e-4 times the mutual information of domain and expert.

    Defaults are those of size M: 6 experts, top 3; rank 4 is one of its ranks, which grow over the stages of a vision
    model. A from N(0, 0.02); no scale, hence `lora_alpha` equal to `r`. Needs `task_ids`: the domain, which the
    authors take from a discriminator that is not part of this. `target_modules` matches the layers of most language
    models.
    Differs from the authors' code: it follows the paper, as the released block always runs the first K experts and
    cuts the gradient of routers and loss; routing is per token (theirs per image), noise stops at inference, B starts
    at zero (their adapter changes the model from the start). Their test-time training on pseudo labels is left to the
    user. Biases inside the experts are `expert_bias=True`, as in the code; the paper has none.
    """
    return {
        "num_experts": 6,
        "r": 4,
        "lora_alpha": 4,
        "init_A": "normal",
        "init_A_range": 0.02,
        "expert_activation": "gelu",
        "expert_scope": "block",
        "adapter_position": "after",
        "target_modules": r".*\.(layers|layer|h|block)\.\d+",
        "router": "domain",
        "router_init": "normal",
        "router_init_range": 0.02,
        "num_tasks": 4,
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 3,
        "weights": "selected_softmax",
        "renormalize": False,
        "routing_losses": {"mutual_information": 5e-4},
    }
