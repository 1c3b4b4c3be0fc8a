"""What holds for every combination of routing choices, whatever the numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from molora import ConfigError, MoLoraConfig
from molora.layer import MoLoraLinear
from molora.plan import plan_module, routing_spec
from molora.routing import GATES, SELECTIONS, SUMS_TO_ONE, WEIGHTS, RoutingExtras, route

pytestmark = pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
settings.register_profile(
    "molora",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
settings.load_profile("molora")

NON_NEGATIVE = sorted(GATES.keys() - {"identity"})
ALWAYS_ONE = ("dense", "top_k", "top_p", "top_1_or_2", "grouped_top_1")
"""Selections that keep at least one expert."""


@st.composite
def configs(draw, **fixed):
    """A possible config of one module with four experts."""
    selection = fixed.get("selection") or draw(st.sampled_from(sorted(SELECTIONS)))
    fields = {
        "num_experts": 4,
        "router": "linear",
        "gate": draw(st.sampled_from(sorted(GATES))),
        "selection": selection,
        "weights": draw(st.sampled_from([None, *(name for name in WEIGHTS if name != "blend")])),
        "renormalize": draw(st.booleans()),
        "temperature": draw(st.sampled_from([0.05, 0.5, 1.0, 3.0])),
        "null_experts": draw(st.sampled_from([0, 0, 2])),
        "shared_experts": draw(st.sampled_from([0, 0, 1])),
        "logit_norm": draw(st.sampled_from([None, None, 1.0])),
        "min_logit": draw(st.sampled_from([None, None, 0.0])),
        "balance_bias_rate": draw(st.sampled_from([None, 0.1])),
        "top_k": draw(st.integers(1, 4)) if selection in ("top_k", "top_k_magnitude", "sparsemixer") else None,
        "top_p": draw(st.floats(0.05, 1.0)) if selection == "top_p" else None,
        "threshold": draw(st.floats(0.01, 1.0)) if selection == "threshold" else None,
        "max_threshold": draw(st.floats(0.01, 1.0)) if selection == "adaptive_threshold" else None,
        "top_gap": draw(st.floats(0.0, 1.0)) if selection == "top_1_or_2" else None,
        "router_jitter": 0.1 if selection == "sparsemixer" else 0.0,
        "freeze_router": draw(st.booleans()),
        "r": 2,
        "init_weights": False,
    }
    try:
        return MoLoraConfig(**{**fields, **fixed})
    except ConfigError:
        assume(False)


@st.composite
def cases(draw, **fixed):
    """A config, logits with ties and extremes, and what else a decision may depend on."""
    config = draw(configs(**fixed))
    columns = config.num_experts + config.null_experts
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    logits = torch.randn(6, columns, generator=generator) * scale
    if draw(st.booleans()):
        logits = logits.round()  # ties
    biased = config.balance_bias_rate is not None
    extras = RoutingExtras(
        threshold_logit=torch.randn(6, 1, generator=generator) if config.selection == "adaptive_threshold" else None,
        bias=torch.randn(columns, generator=generator) * 0.3 if biased else None,
        training=draw(st.booleans()),
    )
    return config, routing_spec(config), logits, extras


@given(cases())
def test_experts_that_were_not_selected_weigh_nothing(case):
    config, spec, logits, extras = case
    routing = route(logits, spec, extras)
    routed = routing.weights[:, : config.num_experts]
    assert torch.isfinite(routing.weights).all()
    assert not routed[~routing.selected[:, : config.num_experts]].any()


@given(cases())
def test_weights_are_not_negative_and_sum_to_one_where_that_is_promised(case):
    config, spec, logits, extras = case
    assume(spec.gate in NON_NEGATIVE and spec.weights != "biased_probability")
    assume(spec.weights != "probability_minus_threshold" or extras.bias is None)
    weights = route(logits, spec, extras).weights[:, : config.num_experts]
    assert (weights >= 0).all()
    total = weights.sum(dim=-1)
    if spec.renormalize:
        near_one = (total - 1).abs() < 1e-5
        assert (near_one | (total == 0)).all()
    elif spec.gate in SUMS_TO_ONE or spec.weights == "selected_softmax":
        assert spec.weights == "one" or (total <= 1 + 1e-5).all()


@given(cases())
def test_as_many_experts_are_selected_as_asked(case):
    config, spec, logits, extras = case
    assume(spec.min_logit is None or extras.training)
    number = route(logits, spec, extras).selected.sum(dim=-1)
    if spec.selection in ("top_k", "top_k_magnitude", "sparsemixer"):
        assert (number == spec.top_k).all()
    elif spec.selection == "grouped_top_1":
        assert (number == spec.expert_groups).all()
    elif spec.selection == "dense":
        assert (number == config.num_experts).all()
    elif spec.selection in ALWAYS_ONE:
        assert (number >= 1).all()


@given(cases(), st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_banned_experts_are_never_selected_and_others_take_their_place(case, kept):
    config, spec, logits, extras = case
    allowed = torch.tensor([*kept, *[True] * config.null_experts])
    routing = route(logits, spec, dataclasses.replace(extras, allowed=allowed))
    assert not routing.selected[:, ~allowed].any()
    assert torch.isfinite(routing.weights).all()
    assert not routing.weights[:, : config.num_experts][:, ~allowed[: config.num_experts]].any()
    if spec.selection in ("top_k", "top_p", "top_1_or_2", "dense", "sparsemixer") and (
        spec.min_logit is None or extras.training
    ):
        wanted = min(spec.top_k, int(allowed.sum())) if spec.selection in ("top_k", "sparsemixer") else 1
        assert (routing.selected.sum(dim=-1) >= wanted).all()


@given(cases())
def test_null_experts_take_part_in_the_selection_and_in_nothing_else(case):
    config, spec, logits, extras = case
    assume(config.null_experts and spec.gate not in ("gumbel_softmax", "relaxed_bernoulli"))
    assume(spec.selection != "sparsemixer" or not extras.training)
    routing = route(logits, spec, extras)
    assert routing.weights.shape[-1] == config.num_experts + config.shared_experts
    twin = dataclasses.replace(spec, null_experts=0, renormalize=False, shared_experts=0)
    full = route(logits, twin, extras).weights[:, : config.num_experts]
    if spec.renormalize:
        total = full.sum(dim=-1, keepdim=True)
        full = full / torch.where(total > 0, total, 1.0)
    torch.testing.assert_close(routing.weights[:, : config.num_experts], full)


@given(cases())
def test_shared_experts_weigh_one_or_what_is_left_of_it(case):
    config, spec, logits, extras = case
    assume(spec.gate not in ("gumbel_softmax", "relaxed_bernoulli") and spec.selection != "sparsemixer")
    for rule in ("one", "remainder"):
        twin = dataclasses.replace(spec, shared_experts=2, shared_weight=rule)
        weights = route(logits, twin, extras).weights
        expected = torch.ones(6) if rule == "one" else 1 - weights[:, : config.num_experts].sum(dim=-1)
        torch.testing.assert_close(weights[:, config.num_experts :], expected.unsqueeze(1).expand(6, 2))


@given(cases())
def test_gradients_are_finite(case):
    _, spec, logits, extras = case
    leaves = [logits.requires_grad_(True)]
    if extras.threshold_logit is not None:
        leaves.append(extras.threshold_logit.requires_grad_(True))
    weights = route(logits, spec, extras).weights
    if not weights.requires_grad:
        return
    for gradient in torch.autograd.grad(weights.square().sum(), leaves, allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all()


def adapted(config):
    torch.manual_seed(3)
    base = nn.Linear(5, 3).requires_grad_(False)
    layer = MoLoraLinear(base, "default", config, plan_module(config, "linear", None)).eval()
    for name, parameter in layer.named_parameters():
        if "router" in name or "threshold" in name:
            nn.init.normal_(parameter)
    return layer.double()


@given(configs(), st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_batch_at_inference(config, seed):
    layer = adapted(config)
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = layer(x)
    for row in range(4):
        torch.testing.assert_close(layer(x[[row]]), together[[row]], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer(x.flatten(0, 1)), together.flatten(0, 1), rtol=1e-9, atol=1e-11)


@given(configs(), st.permutations(range(4)), st.integers(0, 1000))
def test_the_order_of_the_experts_does_not_matter(config, order, seed):
    assume(config.selection != "grouped_top_1" and config.temperature >= 0.5)  # a sharp sigmoid has ties
    layer = adapted(config)
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = layer(x)
    rows = [rank for expert in order for rank in (2 * expert, 2 * expert + 1)]
    with torch.no_grad():
        for name, dim in (("molora_A", 0), ("molora_B", 1)):
            weight = getattr(layer, name)["default"].weight
            rest = range(8, weight.shape[dim])  # shared experts
            weight.copy_(weight.index_select(dim, torch.tensor([*rows, *rest])))
        for container in (layer.molora_router, layer.molora_bias):
            if "default" in container:
                weight = container["default"].weight
                weight.copy_(weight[[*order, *range(4, len(weight))]])
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)


@given(configs(selection="threshold", shared_experts=0), st.integers(0, 1000))
def test_a_token_without_experts_gets_the_base_output(config, seed):
    assume(config.balance_bias_rate is None)
    layer = adapted(config)
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routings = []
    layer.routing_recorder = type("Recorder", (), {"append": staticmethod(lambda *args: routings.append(args[2]))})()
    got, base = layer(x), layer.base_layer(x)
    empty = ~routings[0].selected.any(dim=-1)
    assert torch.equal(got[empty], base[empty])
