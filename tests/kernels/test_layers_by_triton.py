"""Adapted models whose linears run by the fused operation, its kernels interpreted, against the plain way."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from peft import get_peft_model

import molora.fused
from molora import MoLoraConfig, record_routing
from molora.kernels import dispatch

TOP_2 = {"selection": "top_k", "top_k": 2}
CHOICES = {
    "adaptive threshold": {},
    "top-k": TOP_2,
    "top-p": {"selection": "top_p", "top_p": 0.6},
    "sigmoid": {"gate": "sigmoid", "selection": "dense", "renormalize": False},
    "router per input": {"router_sharing": "input", **TOP_2},
    "balancing bias": {"balance_bias_rate": 0.1, **TOP_2},
    "shared experts": {"shared_experts": 2, **TOP_2},
    "shared expert, router per input": {"shared_experts": 1, "router_sharing": "input", **TOP_2},
}
IDS = torch.arange(10).reshape(2, 5) + 4


@pytest.fixture
def fused(monkeypatch):
    """Counts the linears that ran by the fused operation."""
    calls = []
    mixture = molora.fused.mixture
    monkeypatch.setattr(molora.fused, "mixture", lambda *a, **k: (calls.append(k), mixture(*a, **k))[1])
    return calls


def adapted(**fields):
    torch.manual_seed(0)
    config = {"r": 3, "num_experts": 4, "target_modules": ["q_proj", "k_proj", "down_proj"], "init_weights": False}
    return get_peft_model(tiny.tiny_llama(num_hidden_layers=1), MoLoraConfig(**{**config, **fields})).train()


def results(model, kernels, monkeypatch, record=False):
    """Output, what a loss on the decisions and the output sends back, and the decisions."""
    monkeypatch.setattr(dispatch, "_asked", kernels)
    model.zero_grad()
    with record_routing(model) as records:
        logits = model(input_ids=IDS).logits
    loss = logits.square().mean()
    for record in records:
        routing = record.routing
        loss = loss + routing.probabilities.square().mean() + routing.weights.pow(3).mean()
        loss = loss + (0 if routing.threshold is None else routing.threshold.mean())
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for place, record in enumerate(records):
        found |= {
            f"{place} {part}": getattr(record.routing, part).detach().float() for part in ("weights", "selected")
        }
    return {"output": logits.detach(), **found}


@pytest.mark.parametrize("choice", CHOICES)
def test_outputs_decisions_and_gradients_are_those_of_the_plain_way(choice, monkeypatch, fused):
    model = adapted(**CHOICES[choice])
    plain = results(model, "reference", monkeypatch)
    assert not fused
    fast = results(model, "triton", monkeypatch)
    assert len(fused) == (2 if "router_sharing" in CHOICES[choice] else 3)  # k follows q's decision
    assert fast.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_checkpointed_layers_save_the_same_when_nobody_listens(monkeypatch):
    model = adapted()
    plain = results(model, "triton", monkeypatch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = results(model, "triton", monkeypatch)
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=0, atol=0, msg=name)


def test_a_loss_that_reads_the_hidden_goes_another_way(fused, monkeypatch):
    monkeypatch.setattr(dispatch, "_asked", "triton")
    adapted(routing_losses={"expert_contrastive": 0.1}, **TOP_2)(input_ids=IDS)
    assert not fused


def test_rows_of_different_adapters_run_by_their_kernel(monkeypatch):
    model = adapted(**TOP_2)
    model.add_adapter(
        "other", MoLoraConfig(r=3, num_experts=4, target_modules=["q_proj"], init_weights=False, **TOP_2)
    )
    model.eval()
    found = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setattr(dispatch, "_asked", kernels)
        with torch.no_grad():
            found[kernels] = model(input_ids=IDS, adapter_names=["other", "default"]).logits
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_experts", [0, 2])
def test_the_fused_operation_compiles_as_part_of_a_model(shared_experts, monkeypatch, fused):
    monkeypatch.setattr(dispatch, "_asked", "triton")
    model = adapted(shared_experts=shared_experts, **TOP_2)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, 64)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), expected)
    assert len(fused) == 2
