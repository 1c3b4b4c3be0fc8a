"""Small adapted models, and what they give by one way or another, for the tests of the fast path."""

from __future__ import annotations

import tiny
import torch
from peft import get_peft_model

from molora import MoLoraConfig
from molora.calibration import calibrate_routers, needs_calibration
from molora.kernels import dispatch
from molora.routing import BalanceBias

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


TOP_2 = {"selection": "top_k", "top_k": 2}


CHOICES = {
    "adaptive threshold": {},
    "threshold": {"selection": "threshold", "threshold": 0.3},
    "top-k": TOP_2,
    "top-p": {"selection": "top_p", "top_p": 0.6},
    "dense": {"selection": "dense"},
    "sigmoid": {"gate": "sigmoid", "selection": "dense", "renormalize": False},
    "sigmoid top-k": {"gate": "sigmoid", **TOP_2},
    "temperature": {"temperature": 0.5, **TOP_2},
    "router with bias": {"router_bias": True, **TOP_2},
    "balancing bias": {"balance_bias_rate": 0.1, **TOP_2},
    "standardised input": {"router_norm": "standardize", **TOP_2},
    "centred input, bias": {"router_norm": "center", "router_bias": True, **TOP_2},
    "standardised input, threshold": {"router_norm": "standardize", "router_sharing": "input"},
    "plain LoRA": {"num_experts": 1, "router": "none", "selection": "dense"},
    "rank one": {"r": 1, "num_experts": 6, **TOP_2},
    "unequal ranks": {"r": [1, 3, 2, 5], **TOP_2},
    "shared expert": {"shared_experts": 1, **TOP_2},
    "shared expert, adaptive threshold": {"shared_experts": 1},
    "shared experts, balanced": {"shared_experts": 2, "balance_bias_rate": 0.1, **TOP_2},
    "as recommended": {
        "shared_experts": 2,
        "balance_bias_rate": 0.1,
        "router_bias": True,
        "router_norm": "standardize",
        **TOP_2,
    },
    "the rest goes to a shared expert": {
        "shared_experts": 1,
        "shared_weight": "remainder",
        "renormalize": False,
        **TOP_2,
    },
    "null experts": {"null_experts": 2, **TOP_2},
    "frozen experts": {"frozen_experts": 2, **TOP_2},
    "one A": {"expert_layout": "shared_A", **TOP_2},
    "bias of experts": {"expert_bias": True, **TOP_2},
    "activation": {"expert_activation": "gelu", **TOP_2},
    "router per input": {"router_sharing": "input", **TOP_2},
    "router per block": {"router_sharing": "block", **TOP_2},
    "shared router weights": {"router_sharing": "weights", **TOP_2},
    "no token selects": {"selection": "threshold", "threshold": 0.99, "renormalize": False},
}


IDS = torch.arange(26).reshape(2, 13) % 90 + 4


def adapted(dtype=torch.float64, base=None, **fields):
    """A tiny model with an adapter that changes its output."""
    torch.manual_seed(0)
    config = {"r": 3, "num_experts": 4, "target_modules": TARGETS, "init_weights": False, **fields}
    model = get_peft_model(base or tiny.tiny_llama(), MoLoraConfig(**config)).to(dtype)
    if needs_calibration(model):
        calibrate_routers(model, [{"input_ids": IDS}])
    draw_biases(model)
    return model


def draw_biases(model):
    """Balancing biases that change who is chosen, as after some training."""
    for module in model.modules():
        if isinstance(module, BalanceBias):
            module.weight.data.copy_(torch.linspace(-0.2, 0.3, len(module.weight)))


def results(model, kernels, monkeypatch, ids=IDS, **inputs):
    """Output and every gradient."""
    monkeypatch.setattr(dispatch, "_asked", kernels)
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    logits.double().square().mean().backward()
    return {
        "output": logits.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def attention_of(**fields):
    """An attention block, and an input behind a graph, as siblings share them."""
    model = adapted(**{**TOP_2, **fields}).train()
    x = torch.randn(2, 5, 32, dtype=torch.float64).requires_grad_()
    return model.base_model.model.model.layers[0].self_attn, x * 1
