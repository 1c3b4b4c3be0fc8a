"""A packed linear answers as the trained one: one product, a factor for every rank, one product."""

from __future__ import annotations

import functools

import methods
import pytest
import torch
from methods import SETTINGS, build

from molora import ConfigError, MoloraError
from molora.decide import Products, decide
from molora.plain.fixed import layers_of
from molora.plan import plan_module
from molora.serving import gate as gate_module
from molora.serving.gate import rank_gate
from molora.serving.pack import PARTS, pack, split
from molora.serving.ranks import VLLM_RANKS, packed_rows, rank_for_vllm, served_rank
from molora.serving.refusals import why_not, why_not_module
from molora.serving.skeleton import ADAPTER, load_layers

TOKENS = (1, 37)
FREE = {"renormalize": False}
SMALL = {"target_modules": ["q_proj", "k_proj", "down_proj"]}
"""Two linears of one input and one of another."""

CHOICES = {
    "sigmoid, top 2": ("mole", {"selection": "top_k", "gate": "sigmoid"}),
    "relu": ("mole", {"gate": "relu"}),
    "relu, a router bias": ("mole", {"gate": "relu", "router_bias": True}),
    "sparsemax": ("mole", {"gate": "sparsemax"}),
    "identity": ("self-moe", {"gate": "identity"}),
    "gumbel_softmax": ("mole", {"gate": "gumbel_softmax", "temperature": 0.6}),
    "relaxed_bernoulli": ("mole", {"gate": "relaxed_bernoulli", "temperature": 0.6, **FREE}),
    "top_p": ("mole", {"selection": "top_p", "top_p": 0.6}),
    "threshold": ("mole", {"selection": "threshold", "threshold": 0.4}),
    "threshold, above it": ("mole", {"selection": "threshold", "weights": "probability_minus_threshold", **FREE}),
    "adaptive threshold, whole probability": (
        "adamole",
        {"weights": "probability", "experts_per_token": 2.5, "max_threshold": 0.5},
    ),
    "top_1_or_2": ("mole", {"selection": "top_1_or_2", "top_gap": 0.4}),
    "grouped_top_1": ("mole", {"selection": "grouped_top_1", "expert_groups": 2}),
    "sparsemixer": ("mole", {"selection": "sparsemixer", "router_jitter": 0.1, **FREE}),
    "top_k_magnitude": ("flylora", {"router": "linear", "r": 2, "freeze_router": True}),
    "selected_softmax": ("mole", {"selection": "top_k", "weights": "selected_softmax", **FREE}),
    "one": ("mole", {"selection": "top_k", "weights": "one", "freeze_router": True, **FREE}),
    "biased_probability": (
        "mole",
        {"selection": "top_k", "weights": "biased_probability", "balance_bias_rate": 0.01, **FREE},
    ),
    "balance bias": ("mole", {"selection": "top_k", "balance_bias_rate": 0.01}),
    "shared expert": ("mole", {"selection": "top_k", "shared_experts": 1}),
    "shared experts take the rest": (
        "mole",
        {"selection": "top_k", "shared_experts": 2, "shared_weight": "remainder", **FREE},
    ),
    "null experts": ("mole", {"selection": "top_k", "null_experts": 2}),
    "null and shared experts": ("mole", {"selection": "top_k", "null_experts": 2, "shared_experts": 1, **FREE}),
    "min_logit": ("mole", {"selection": "top_k", "min_logit": 0.5}),
    "logit_norm": ("mole", {"logit_norm": 2.0}),
    "temperature": ("mole", {"temperature": 0.3}),
    "one router for linears of one input": ("adamole", {"router_sharing": "input", "router_bias": True}),
    "one router for linears of one input, balanced": (
        "mole",
        {"router_sharing": "input", "selection": "top_k", "balance_bias_rate": 0.01},
    ),
    "one matrix for all routers": ("mole", {"router_sharing": "weights", "router_bias": True}),
    "standardised": ("adamole", {"router_norm": "standardize"}),
    "centred": ("adamole", {"router_norm": "center", "router_bias": True}),
    "unequal ranks": ("adamole", {"r": [3, 1, 5, 2]}),
    "ranks by module": ("adamole", {"rank_pattern": {"q_proj": 5, "down_proj": [1, 2, 3, 4]}}),
    "scales by module": ("mole", {"alpha_pattern": {"k_proj": 3}, "use_rslora": True, "scale_by": "total"}),
    "more experts in later layers": ("adamole", {"num_experts": [2, 5]}),
    "frozen experts": ("mole", {"frozen_experts": 2}),
    "cosine": ("mole", {"router": "cosine"}),
    "prototype": ("mole", {"router": "prototype"}),
    "prototype, threshold": ("adamole", {"router": "prototype"}),
    "cosine, threshold": ("adamole", {"router": "cosine"}),
    "activation_norm": ("mole", {"router": "activation_norm", "r": [2, 3, 1, 4]}),
    "pairs": ("mole", {"expert_layout": "pairs", "num_experts": 6, "r": [2, 3]}),
    "shared_A": ("mole", {"expert_layout": "shared_A"}),
    "shared_A, shared expert": ("mole", {"expert_layout": "shared_A", "shared_experts": 1, "selection": "top_k"}),
    "one expert that may be left out": ("phatgoose-gate", {"min_logit": 0.2}),
}
"""A preset, and what is chosen otherwise."""


def is_servable(preset):
    config = methods.config_of(preset)
    plan = plan_module(config, "model.layers.0.mlp.down_proj", 2)
    return why_not(config) is None and why_not_module(config, plan) is None


SERVABLE = {preset: (preset, {}) for preset in SETTINGS if is_servable(preset)}
CASES = SERVABLE | CHOICES


@functools.cache
def trained(case):
    """An adapted model whose every tensor is drawn, so that routing decides much and every constant is there."""
    preset, overrides = CASES[case]
    model = build(preset, **SMALL, **overrides)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "input_mean", None) is not None:
            size = module.input_mean.shape
            module.set_statistics(torch.randn(size, generator=generator), torch.rand(size, generator=generator) + 0.5)
    return model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The layers of a case, saved and loaded on the skeleton of the base model; and its folder."""

    @functools.cache
    def load(case):
        folder, model = tmp_path_factory.mktemp("adapter"), trained(case)
        model.save_pretrained(folder)
        base = model.get_base_model().config
        base.architectures = [type(model.get_base_model()).__name__]
        return folder, load_layers(folder, base)

    return load


def inputs(size, tokens=37, seed=0):
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(seed))


def size_of(layer):
    return layer.matrices("default")[0].shape[1]


def served(packed, x, factors=None):
    """What a server computes. Without a gate, or with other factors: what it would compute then."""
    products = x @ packed.a.T
    if packed.gate is None:
        return products @ packed.b.T
    rank = packed.gate.rank
    factors = rank_gate(products, packed.gate, x) if factors is None else factors
    return (products[:, :rank] * factors) @ packed.b[:, :rank].T


@functools.cache
@torch.no_grad()
def answers(case, loaded, tokens):
    """Of every linear: its name, its packed form, the input, and what the trained one adds.

    Linears of one size read the same, as those do that share a router.
    """
    _, skeletons = loaded(case)
    layers = layers_of(trained(case), "default")
    assert list(layers) == list(skeletons)
    read = {key: inputs(size_of(layer), tokens) for key, layer in layers.items()}
    return [
        (key, pack(skeletons[key], ADAPTER, torch.float32), read[key], layer.delta("default", read[key]))
        for key, layer in layers.items()
    ]


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def test_most_presets_can_be_served():
    assert {"recommended", "adamole", "mole", "loramoe", "arrow", "phatgoose", "flylora", "static"} < set(SERVABLE)
    assert set(SERVABLE) < set(SETTINGS)


@pytest.mark.parametrize("case", CASES)
def test_the_packed_form_is_the_trained_linear(case, loaded):
    for tokens in TOKENS:
        for key, packed, x, expected in answers(case, loaded, tokens):
            got = served(packed, x)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
            assert not packed.b[:, packed.gate.rank if packed.gate else packed.rows :].any()


@pytest.mark.parametrize("case", CASES)
def test_wrong_routing_would_show(case, loaded):
    """The control of the test above: every expert in full, or the routing of another token, answers otherwise."""
    routed = [answer for answer in answers(case, loaded, 37) if answer[1].gate is not None]
    plans = [layer.molora_plan["default"] for layer in layers_of(trained(case), "default").values()]
    assert len(routed) == sum(not plan.is_constant for plan in plans)
    for key, packed, x, expected in routed:
        factors = rank_gate(x @ packed.a.T, packed.gate, x)
        for wrong in (packed.gate.rank_map.scale.expand_as(factors), factors.roll(1, 0)):
            assert distance(served(packed, x, wrong), expected) > 1e-2, key


@pytest.mark.parametrize("case", CASES)
def test_ranks_say_how_many_rows_a_linear_takes(case, loaded):
    folder, skeletons = loaded(case)
    for dtype in PARTS:
        taken = {key: pack(layer, ADAPTER, dtype) for key, layer in skeletons.items()}
        for key, packed in taken.items():
            allowed = packed_rows(skeletons[key].molora_plan[ADAPTER], dtype)
            assert len(packed.a) == packed.b.shape[1] <= allowed
            if packed.gate is not None:
                assert len(packed.a) == packed.gate.rows
                # Logits that are `A x` itself need no rows of their own if A loses nothing; nobody knows before.
                assert packed.gate.rows == allowed or (packed.gate.parts == 1 and PARTS[dtype] > 1)
        most = max(packed_rows(layer.molora_plan[ADAPTER], dtype) for layer in skeletons.values())
        assert served_rank(folder, dtype) == most


@pytest.mark.parametrize("case", ["mos", "lorahub", "psec", "selma", "static", "lora"])
def test_a_constant_adapter_is_packed_as_the_plain_lora_it_is(case, loaded):
    _, skeletons = loaded(case)
    for key, layer in layers_of(trained(case), "default").items():
        packed = pack(skeletons[key], ADAPTER, torch.float32)
        assert packed.gate is None
        torch.testing.assert_close(packed.b @ packed.a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


def routers_rows(layer):
    """What a trained router multiplies the input with, and behind it the threshold net, `[n, in]` fp32."""
    router, threshold = layer.router_of("default"), layer.molora_threshold
    rows = router.rows() if hasattr(router, "rows") else router.weight
    return torch.cat([rows, *(net.rows() for net in threshold.values())]).detach()


@pytest.mark.parametrize("case", ["mole", "adamole", "standardised", "arrow"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 1e-5)])
def test_the_parts_of_a_router_sum_to_its_rows(case, loaded, dtype, tolerance):
    """Exactly in bf16, whose three parts have 24 bits; in fp16 but for the last bits of small values."""
    _, skeletons = loaded(case)
    for key, layer in layers_of(trained(case), "default").items():
        packed = pack(skeletons[key], ADAPTER, dtype)
        parts = packed.a[packed.gate.rank :].float().unflatten(0, (PARTS[dtype], -1))
        torch.testing.assert_close(parts.flip(0).sum(0), routers_rows(layer), rtol=tolerance, atol=tolerance / 100)


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e3, 1e30])
def test_three_numbers_of_bf16_are_one_of_fp32(magnitude):
    values = torch.randn(4096) * magnitude
    parts = split(values, torch.bfloat16, PARTS[torch.bfloat16])
    assert torch.equal(sum(part.float() for part in reversed(parts)), values)
    two = sum(part.float() for part in parts[:2])
    assert not torch.equal(two, values)


@pytest.fixture
def routings(monkeypatch):
    """The decisions of gates, in the order they are made."""
    made = []
    plain = gate_module.route
    monkeypatch.setattr(gate_module, "route", lambda *given: made.append(plain(*given)) or made[-1])
    return made


IN_16_BITS = [
    *("mole", "adamole", "recommended", "standardised", "arrow", "null experts", "prototype", "cosine", "flylora"),
    *("balance bias", "activation_norm", "top_p"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", IN_16_BITS)
@torch.no_grad()
def test_routing_in_16_bits_is_that_in_fp32(case, loaded, routings, dtype):
    """Thousands of tokens choose the same experts. The control has the routers' rows rounded to 16 bits."""
    _, skeletons = loaded(case)
    for key, layer in list(layers_of(trained(case), "default").items())[::2]:
        packed = pack(skeletons[key], ADAPTER, dtype)
        x = inputs(size_of(layer), 2048, seed=2).to(dtype).float()
        products, gate = x @ packed.a.float().T, packed.gate
        rounded = products.clone()
        rounded[:, gate.rank + gate.router_rows :] = 0.0  # the first part is the value rounded
        rank_gate(products, gate, x)
        rank_gate(rounded, gate, x)
        expected = decide(layer, "default", x, Products(layer.hidden("default", x)), None)
        found, control = routings[-2:]
        others = (found.selected != expected.selected).any(-1).sum()
        assert others <= (0 if dtype == torch.bfloat16 else 2), key  # two parts of fp16 lack the last bits
        error, of_control = ((it.logits - expected.logits).abs().max() for it in (found, control))
        assert error < 1e-4 < of_control
        assert of_control > 10 * error


@pytest.mark.parametrize("case", ["flylora", "activation_norm"])
def test_a_router_that_reads_the_ranks_has_no_rows_of_its_own_where_16_bits_hold_a(case):
    preset, overrides = CASES[case]
    model = build(preset, **SMALL, **overrides)
    for name, parameter in model.named_parameters():
        if "molora_A" in name:
            parameter.data = parameter.data.bfloat16().float()
    for layer in layers_of(model, "default").values():
        x = inputs(size_of(layer)).bfloat16().float()
        packed = pack(layer, "default", torch.bfloat16)
        assert packed.rows == packed.gate.rank
        factors = rank_gate(x @ packed.a.float().T, packed.gate, x)
        whole = pack(layer, "default", torch.float32)
        assert torch.equal(factors, rank_gate(x @ whole.a.T, whole.gate, x))


@pytest.mark.parametrize("container", ["molora_A", "molora_B", "molora_router"])
def test_values_beyond_fp16_are_refused_and_served_in_other_types(container):
    model = build("mole", **SMALL)
    layer = next(iter(layers_of(model, "default").values()))
    next(getattr(layer, container).parameters()).data[0, 0] = 1e5
    with pytest.raises(MoloraError, match=r"q_proj .*float16; serve it in bfloat16 or float32"):
        pack(layer, "default", torch.float16)
    for dtype in (torch.float32, torch.bfloat16):
        assert pack(layer, "default", dtype).a.isfinite().all()


def test_a_gate_does_not_share_memory_with_the_layer():
    """A server keeps gates, and lets go of the model they came from."""
    model = build("recommended", **SMALL)
    layer = next(iter(layers_of(model, "default").values()))
    packed = pack(layer, "default", torch.float32)
    before = rank_gate(inputs(32) @ packed.a.T, packed.gate)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(rank_gate(inputs(32) @ packed.a.T, packed.gate), before)


@pytest.mark.parametrize(
    ("rank", "allowed"),
    [(1, 1), (2, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 320), (321, 512), (512, 512)],
)
def test_vllm_has_room_for_some_ranks(rank, allowed):
    assert rank_for_vllm(rank) == allowed


def test_a_rank_beyond_vllms_largest_is_refused():
    with pytest.raises(ConfigError, match=f"rank 513 .* {VLLM_RANKS[-1]} at most"):
        rank_for_vllm(513)
