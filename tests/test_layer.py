"""The adapted linear computes the paper's equation: every choice, every kind of base layer, every dtype and shape."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora import MergeError, MoLoraConfig
from molora.experts import RankMap
from molora.kernels import separate
from molora.layer import MoLoraLinear
from molora.plan import plan_module

CHOICES = {
    "adamole": {},
    "adamole, higher limit": {"max_threshold": 0.6},
    "threshold": {"selection": "threshold", "threshold": 0.3},
    "threshold, minus": {"selection": "threshold", "weights": "probability_minus_threshold"},
    "top-k": {"selection": "top_k", "top_k": 2},
    "top-1, not renormalised": {"selection": "top_k", "top_k": 1, "renormalize": False},
    "top-k, all experts": {"selection": "top_k", "top_k": 4},
    "top-p": {"selection": "top_p", "top_p": 0.5},
    "dense": {"selection": "dense", "renormalize": False},
    "sigmoid, dense": {"gate": "sigmoid", "selection": "dense", "renormalize": False},
    "sigmoid, top-k": {"gate": "sigmoid", "selection": "top_k", "top_k": 3},
    "sigmoid, threshold": {"gate": "sigmoid", "selection": "threshold", "threshold": 0.5},
    "sharp": {"temperature": 0.1},
    "unequal ranks": {"r": [1, 4, 2, 5]},
    "unequal ranks, rslora": {"r": [1, 4, 2, 5], "use_rslora": True},
    "rank one": {"r": 1},
    "rslora": {"use_rslora": True},
    "static": {"router": "static", "selection": "dense"},
    "static, top-k": {"router": "static", "selection": "top_k", "top_k": 2},
    "one expert": {"router": "none", "num_experts": 1, "selection": "dense"},
}
BASES = {
    "linear": lambda: nn.Linear(11, 7),
    "linear without bias": lambda: nn.Linear(11, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 11),
}
SHAPES = [(2, 5, 11), (13, 11), (1, 1, 11), (1, 11)]


def build(choice="adamole", base="linear", **overrides):
    fields = {"r": 3, "num_experts": 4, "lora_alpha": 5, "init_weights": False, **CHOICES[choice], **overrides}
    config = MoLoraConfig(fan_in_fan_out=base == "conv1d", **fields)
    layer = MoLoraLinear(BASES[base](), "default", config, plan_module(config, "linear", None))
    layer.base_layer.requires_grad_(False)
    for name, parameter in layer.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    return layer, config


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("base", BASES)
def test_output_is_the_papers_equation(choice, base):
    layer, config = build(choice, base)
    for shape in SHAPES:
        x = torch.randn(shape)
        expected = reference.layer_output(layer, x, config)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("choice", CHOICES)
def test_every_gradient_is_that_of_the_slow_form(choice):
    layer, config = build(choice)
    layer = layer.double()
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def slow():
        weights = None
        if config.router != "none":
            caught = []
            layer.routing_recorder = type("R", (), {"append": staticmethod(lambda *args: caught.append(args[2]))})()
            layer(x)
            layer.routing_recorder = None
            weights = caught[0].weights if caught else None
        a, b = layer.molora_A["default"].weight, layer.molora_B["default"].weight
        ranks, out, start = layer.molora_ranks["default"].ranks, layer.base_layer(x), 0
        if weights is None and config.router == "static":
            from molora.routing import route

            weights = route(layer.molora_router["default"](), layer.molora_spec["default"]).weights.expand(3, -1)
        for expert, rank in enumerate(ranks):
            scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
            delta = x @ a[start : start + rank].T @ b[:, start : start + rank].T * scale
            out = out + (delta if weights is None else weights[:, expert : expert + 1] * delta)
            start += rank
        return out

    direction = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.autograd.grad((slow() * direction).sum(), inputs)
    got = torch.autograd.grad((layer(x) * direction).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_token_that_selects_nothing_gets_the_base_output_and_finite_gradients():
    with pytest.warns(UserWarning, match="above 1/num_experts"):
        layer, _ = build(max_threshold=1.0)
    nn.init.zeros_(layer.molora_router["default"].weight)  # all probabilities 1/4
    nn.init.constant_(layer.molora_threshold["default"].bias, 9.0)
    nn.init.zeros_(layer.molora_threshold["default"].weight)
    x = torch.randn(4, 11, requires_grad=True)
    out = layer(x)
    assert torch.equal(out, layer.base_layer(x))
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


def test_a_fresh_adapter_is_an_exact_identity():
    layer, _ = build(init_weights=True)
    x = torch.randn(2, 5, 11)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_routing_is_fp32_whatever_the_model_computes_in():
    layer, _ = build("top-k")
    layer = layer.to(torch.bfloat16)
    routings = []
    layer.routing_recorder = type("R", (), {"append": staticmethod(lambda *args: routings.append(args[2]))})()
    x = torch.randn(64, 11, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    exact = x.double() @ layer.molora_router["default"].weight.double().T
    assert out.dtype == torch.bfloat16
    assert routings[0].logits.dtype == torch.float32
    torch.testing.assert_close(routings[0].logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bit_models_stay_close_to_fp32(compute, adapter, autocast):
    layer, config = build()
    exact_layer, _ = build()
    exact_layer.load_state_dict(layer.state_dict())
    for name, parameter in layer.named_parameters():
        parameter.data = parameter.data.to(compute if "base_layer" in name else adapter)
    x = torch.randn(2, 5, 11)
    with torch.autocast("cpu", compute, enabled=autocast):
        out = layer(x.to(compute))
    assert out.dtype == compute
    torch.testing.assert_close(out.double(), reference.layer_output(exact_layer, x, config), rtol=0.05, atol=0.1)


def test_scale_survives_a_cast_of_the_model():
    layer, _ = build("unequal ranks, rslora")
    before = layer.molora_ranks["default"].scale.clone()
    assert torch.equal(layer.to(torch.bfloat16).molora_ranks["default"].scale, before)


def test_compiles_without_a_graph_break():
    layer, _ = build()
    x = torch.randn(2, 5, 11)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()


def test_merging_a_static_mixture_is_exact_and_reversible():
    for base in BASES:
        layer, config = build("static, top-k", base)
        x = torch.randn(2, 5, 11)
        before = layer.base_layer(x)
        expected = reference.layer_output(layer, x, config)
        layer.merge(safe_merge=True)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        torch.testing.assert_close(layer.base_layer(x), before, rtol=1e-5, atol=1e-5)


def test_merging_a_routed_mixture_says_why_not_and_what_to_do():
    layer, _ = build()
    with pytest.raises(MergeError, match=r"routes every token.*from_preset\('static'\)"):
        layer.merge()


@pytest.mark.parametrize("ranks", [(1, 1, 1, 1, 1), (2, 2), (1, 4), (5, 0)])
@pytest.mark.parametrize("weights", ["one each", "fixed", "per token"])
def test_packed_product_equals_the_sum_over_experts(ranks, weights):
    scales = [0.5 + expert for expert in range(len(ranks))]
    a, b = torch.randn(sum(ranks), 11), torch.randn(7, sum(ranks))
    given = {"one each": None, "fixed": torch.randn(len(ranks)), "per token": torch.randn(6, len(ranks))}[weights]
    spread = torch.ones(6, len(ranks)) if given is None else given.expand(6, -1)
    x, expected, start = torch.randn(6, 11), torch.zeros(6, 7), 0
    for expert, rank in enumerate(ranks):
        block = slice(start, start + rank)
        expected += spread[:, [expert]] * scales[expert] * (x @ a[block].T @ b[:, block].T)
        start += rank
    product = separate(x @ a.T, given, RankMap(ranks, scales), None) @ b.T
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-5)


def test_constants_survive_the_meta_device():
    layer, _ = build("unequal ranks")
    ranks = layer.molora_ranks["default"]
    expert, scale = ranks.expert.clone(), ranks.scale.clone()
    layer.to("meta")
    with torch.device("meta"):
        built, _ = build("unequal ranks")
    for constants in (ranks, built.molora_ranks["default"], layer.to_empty(device="cpu").molora_ranks["default"]):
        assert torch.equal(constants.expert, expert)
        assert torch.equal(constants.scale, scale)
