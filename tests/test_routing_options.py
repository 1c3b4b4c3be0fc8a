"""Routing choices that no preset shows: each against a slow loop written from its definition."""

from __future__ import annotations

import math

import pytest
import torch
from methods import build, layers_of, tokens, watched
from torch import nn

from molora import MoloraError, record_routing
from molora.routing import GATES, ROUTERS, RouterInput, RouterSize, RoutingExtras, RoutingSpec, route
from molora.routing.selection import within_capacity
from molora.routing.sparsemixer import sparsemixer

TRAINING = RoutingExtras(training=True)


def spec(**fields):
    plain = {"gate": "softmax", "selection": "dense", "weights": "probability", "renormalize": False}
    numbers = {"temperature": 1.0, "top_k": 2, "top_p": 0.8, "threshold": 0.2, "max_threshold": 0.2}
    return RoutingSpec(**{**plain, **numbers, **fields})


def logits(*shape, scale=1.0):
    return torch.randn(*shape, dtype=torch.float64) * scale


def sparsemax_by_bisection(row):
    """The level at which what lies above it sums to one."""
    low, high = row.max() - 1, row.max()
    for _ in range(80):
        level = (low + high) / 2
        low, high = (level, high) if (row - level).clamp(min=0).sum() > 1 else (low, level)
    return (row - low).clamp(min=0)


GATE_REFERENCES = {
    "softmax": lambda row: (row - row.max()).exp() / (row - row.max()).exp().sum(),
    "sigmoid": lambda row: 1 / (1 + (-row).exp()),
    "relu": lambda row: torch.stack([max(value, torch.zeros_like(value)) for value in row]),
    "sparsemax": sparsemax_by_bisection,
    "gumbel_softmax": lambda row: row.exp() / row.exp().sum(),
    "identity": lambda row: row,
}


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("gate", GATE_REFERENCES)
def test_a_gate_is_its_definition_at_inference(gate, scale):
    x = logits(20, 6, scale=scale)
    got = route(x, spec(gate=gate, temperature=0.7)).probabilities
    torch.testing.assert_close(got, torch.stack([GATE_REFERENCES[gate](row / 0.7) for row in x]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_of_gates_are_those_of_small_steps(gate):
    x = logits(3, 5).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: GATES[gate](x, 0.7, False), x)


@pytest.mark.parametrize("gate", ["gumbel_softmax", "relaxed_bernoulli"])
def test_a_sampling_gate_samples_by_its_probabilities_in_training(gate):
    x = torch.tensor([1.0, 0.0, -0.5]).double()
    drawn = GATES[gate](x.expand(20000, 3), 0.1, True)
    if gate == "gumbel_softmax":
        torch.testing.assert_close(drawn.sum(dim=-1), torch.ones(20000).double())
        shares = torch.bincount(drawn.argmax(dim=-1), minlength=3) / 20000
        expected = x.softmax(dim=-1)
    else:
        shares, expected = (drawn > 0.5).double().mean(dim=0), x.sigmoid()
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=0.02)


def test_normalised_logits_have_a_given_spread_and_no_mean():
    x = logits(10, 6, scale=3.0)
    got = route(x, spec(logit_norm=1.5)).logits
    for row, ours in zip(x, got, strict=True):
        mean = sum(row) / 6
        spread = math.sqrt(sum((value - mean) ** 2 for value in row) / 6)
        torch.testing.assert_close(ours, 1.5 * (row - mean) / spread)


def kept_top_1_or_2(row, gap):
    order = sorted(range(len(row)), key=lambda e: -row[e])
    return set(order[:2] if row[order[0]] - row[order[1]] <= gap else order[:1])


def kept_by_group(row, groups):
    size = len(row) // groups
    return {max(range(group * size, (group + 1) * size), key=lambda e: row[e]) for group in range(groups)}


SELECTION_REFERENCES = {
    "top_1_or_2": (lambda row: kept_top_1_or_2(row, 0.15), {"top_gap": 0.15}),
    "grouped_top_1": (lambda row: kept_by_group(row, 3), {"expert_groups": 3}),
    "top_k_magnitude": (lambda row: set(row.abs().topk(2).indices.tolist()), {"gate": "identity"}),
}


@pytest.mark.parametrize("selection", SELECTION_REFERENCES)
def test_a_selection_keeps_what_its_rule_says(selection):
    kept, fields = SELECTION_REFERENCES[selection]
    got = route(logits(50, 6), spec(selection=selection, **fields))
    numbers = {len(kept(row)) for row in got.probabilities}
    assert numbers == ({1, 2} if selection == "top_1_or_2" else {3} if selection == "grouped_top_1" else {2})
    for row, selected, weights in zip(got.probabilities, got.selected, got.weights, strict=True):
        assert set(selected.nonzero().flatten().tolist()) == kept(row)
        torch.testing.assert_close(weights, torch.where(selected, row, 0.0))


def test_sparsemixer_takes_the_best_at_inference_each_by_its_probability_among_the_near():
    x = logits(40, 5)
    selected, weights = sparsemixer(x, 2, 0.1, training=False)
    for row, kept, weight in zip(x, selected, weights, strict=True):
        left = row.clone()
        expected = torch.zeros(5, dtype=torch.float64)
        for _ in range(2):
            best = left.max()
            near = [e for e in range(5) if left[e] > -math.inf and (best - row[e]) / max(abs(row[e]), best) <= 0.2]
            chosen = int(left.argmax())
            expected[chosen] = row[chosen].exp() / sum(row[e].exp() for e in near)
            left[chosen] = -math.inf
        torch.testing.assert_close(weight, expected)
        assert torch.equal(kept, expected > 0)


def test_sparsemixer_samples_by_probability_and_differentiates_the_plain_one():
    row = torch.tensor([1.0, 0.9, 0.8, -3.0]).double()
    x = row.expand(20000, 4).clone().requires_grad_(True)
    selected, weights = sparsemixer(x, 1, 0.25, training=True)
    shares = selected.double().mean(dim=0)
    expected = torch.cat([row[:3].softmax(dim=-1), torch.zeros(1).double()])
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.02)
    factors = weights[selected] / expected.expand(20000, 4)[selected]
    assert torch.all((factors - 1).abs().minimum((factors - 1 / 3).abs()) < 1e-6)
    others = selected[:, 1]
    torch.testing.assert_close((factors[others] > 0.5).double().mean(), torch.tensor(0.25).double(), rtol=0, atol=0.02)
    (gradient,) = torch.autograd.grad(weights.sum(), x)
    probability = (selected * expected).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(gradient, probability * (selected.double() - expected))


def test_sparsemixer_with_fewer_allowed_than_asked_takes_those():
    x = logits(10, 4).requires_grad_(True)
    for training in (False, True):
        extras = RoutingExtras(allowed=torch.tensor([False, True, False, False]), training=training)
        got = route(x, spec(selection="sparsemixer", top_k=2, router_jitter=0.1), extras)
        assert torch.equal(got.selected, extras.allowed.expand(10, 4))
        assert torch.isfinite(got.weights).all()
        assert torch.isfinite(torch.autograd.grad(got.weights.sum(), x)[0]).all()


def test_a_full_expert_takes_no_more_and_padding_takes_no_room():
    selected = torch.rand(3, 8, 4) < 0.6
    mask = torch.rand(3, 8) < 0.7
    got = within_capacity(selected, mask, 0.5, 2)
    room, taken = math.ceil(0.5 * 24 * 2 / 4), [0] * 4
    for row in range(3):
        for token in range(8):
            for expert in range(4):
                fits = bool(selected[row, token, expert] and mask[row, token]) and taken[expert] < room
                taken[expert] += fits
                assert bool(got[row, token, expert]) == fits
    assert max(taken) == room


@pytest.mark.parametrize("weights", ["probability", "one", "selected_softmax"])
def test_dropped_experts_count_nothing_in_training_only(weights):
    fields = {"weights": weights, "expert_dropout": 0.5}
    got = route(logits(200, 6), spec(**fields), TRAINING)
    dropped = got.probabilities == 0
    assert 0.4 < dropped.double().mean() < 0.6
    assert not got.weights[dropped].any()
    assert (got.weights[~dropped] > 0).all()
    assert (route(logits(200, 6), spec(**fields)).weights > 0).all()


@pytest.mark.parametrize(
    "fields",
    [{"router_noise": 1.0}, {"expert_dropout": 0.5}, {"capacity_factor": 0.3, "selection": "top_k"}],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_for_training_only_changes_nothing_at_inference(fields):
    x = logits(30, 6)
    plain = spec(**{name: value for name, value in fields.items() if name == "selection"})
    assert torch.equal(route(x, spec(**fields)).weights, route(x, plain).weights)
    assert not torch.equal(route(x, spec(**fields), TRAINING).weights, route(x, plain).weights)


@pytest.mark.parametrize("field", ["router_noise", "router_jitter", "expert_dropout"])
def test_a_model_is_noisy_in_training_only(field):
    noisy, plain = build("molora", **{field: 0.5}), build("molora")
    with torch.no_grad():
        assert torch.equal(noisy(tokens()).logits, plain(tokens()).logits)
        noisy.train()
        assert not torch.equal(noisy(tokens()).logits, plain(tokens()).logits)


def router(name, **fields):
    size = RouterSize(**{"in_features": 7, "num_experts": 5, "dim": ROUTERS[name].default_dim, **fields})
    made = ROUTERS[name](size).double()
    made.reset_parameters("kaiming_uniform", 0.02)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def relu(x):
    return x.clamp(min=0)


ROUTER_REFERENCES = {
    "cosine": ({}, lambda m, x, e: cosine(x, m.weight[e]) / m.log_temperature.exp().clamp(min=0.01)),
    "cosine, projected": (
        {"dim": 3},
        lambda m, x, e: cosine(m.projection @ x, m.weight[e]) / m.log_temperature.exp().clamp(min=0.01),
    ),
    "mlp": ({"dim": 4}, lambda m, x, e: m.weight[e] @ relu(m.weight_in @ x + m.bias_in) + m.bias[e]),
    "linear": ({"bias": True}, lambda m, x, e: m.weight[e] @ x + m.bias[e]),
    "arrow": ({}, lambda m, x, e: abs(m.weight[e] @ x)),
}


@pytest.mark.parametrize("case", ROUTER_REFERENCES)
def test_a_router_is_its_equation(case):
    fields, expected = ROUTER_REFERENCES[case]
    made = router(case.split(",")[0], **fields)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    got = made(RouterInput(x))
    for row in range(2):
        for token in range(3):
            for expert in range(5):
                torch.testing.assert_close(
                    got[row, token, expert].reshape(()), expected(made, x[row, token], expert).reshape(())
                )


AUTOCAST = {
    **{name: {"name": name} for name in ("linear", "cosine", "mlp", "arrow", "prototype")},
    **{f"linear, {norm}": {"name": "linear", "norm": norm} for norm in ("center", "standardize")},
    "linear, standardize, bias": {"name": "linear", "norm": "standardize", "bias": True},
}


@pytest.mark.parametrize("case", AUTOCAST)
def test_autocast_changes_neither_logits_nor_their_gradients(case):
    made = router(**AUTOCAST[case]).float()
    if getattr(made, "input_mean", None) is not None:
        made.set_statistics(100 * torch.randn(7), torch.rand(7) + 0.5)
    x, found = 100 * torch.randn(2, 3, 7), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = made(RouterInput(x))
        found.append([logits, *torch.autograd.grad(logits.square().sum(), list(made.parameters()))])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_a_domain_router_has_rows_and_noise_of_each_rows_domain():
    made = router("domain", num_tasks=3)
    x, ids = torch.randn(4, 2, 7, dtype=torch.float64), torch.tensor([2, 0, 1, 2])
    given = RouterInput(x, task_ids=ids.unsqueeze(1))
    got = made.eval()(given)
    with torch.random.fork_rng(devices=[]):
        noise = torch.randn_like(got)
    noisy = made.train()(given)
    for row, domain in enumerate(ids.tolist()):
        for token in range(2):
            torch.testing.assert_close(got[row, token], made.weight[domain] @ x[row, token])
            scale = (1 + (made.noise[domain] @ x[row, token]).exp()).log()
            torch.testing.assert_close(noisy[row, token], got[row, token] + noise[row, token] * scale)


@pytest.mark.parametrize("sharing", ["none", "weights"])
def test_a_recurrent_router_carries_its_state_over_the_layers(sharing):
    targets = ["q_proj", "up_proj"]
    fields = {"router": "recurrent", "router_dim": 6, "target_modules": targets, "router_init": "normal"}
    model = build("molora", router_sharing=sharing, **fields).double()
    with watched(model) as seen, record_routing(model) as records, torch.no_grad():
        model(input_ids=tokens())
    assert len(records) == 4
    state = torch.zeros(18, 6, dtype=torch.float64)
    for record, (name, layer) in zip(records, layers_of(model).items(), strict=True):
        assert record.layer == name
        made = layer.router_of("default")
        cell = nn.GRUCell(6, 6).double()
        for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, key).data.copy_(getattr(made, key))
        with torch.no_grad():
            state = cell(seen[name].x.reshape(18, -1) @ made.projection.T, state)
            torch.testing.assert_close(record.routing.logits.reshape(18, -1), state @ made.weight.T)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_recurrent_router_generates_with_cache_and_trains_with_checkpointing(checkpointing):
    model = build("molora", router="recurrent", router_dim=6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with_cache = model.generate(input_ids=tokens(), **options)
    assert torch.equal(model.generate(input_ids=tokens(), use_cache=False, **options), with_cache)
    if not checkpointing:
        return
    gradients = []
    for enabled in (False, True):
        model.train().zero_grad()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-7)


SHARED = {
    "none": (14, 14),
    "block": (4, 4),
    "model": (1, 1),
    "weights": (2, 14),
}
"""Of 14 linears: routers, and decisions a pass. Inputs have two sizes."""


@pytest.mark.parametrize("sharing", SHARED)
def test_routers_and_decisions_are_shared_as_asked(sharing):
    model = build("molora", router_sharing=sharing).double()
    with watched(model) as seen, record_routing(model) as records, torch.no_grad():
        model(input_ids=tokens())
    routers = [name for name, _ in model.named_parameters() if "molora_router" in name]
    assert (len(routers), len(records)) == SHARED[sharing]
    decided = {record.layer: record.routing for record in records}
    for name, layer in layers_of(model).items():
        leader = layer if "default" not in layer.molora_group else layer.molora_group["default"].leader
        routing = decided.get(name) or decided[leader.routing_name]
        source = seen[name].x if name in decided else seen[leader.routing_name].x
        weight = layer.router_of("default").weight
        torch.testing.assert_close(routing.weights, (source @ weight.T).softmax(dim=-1))
        a, b = layer.matrices("default")
        gate = layer.molora_ranks["default"](routing.weights)
        torch.testing.assert_close(seen[name].y, seen[name].base + (seen[name].x @ a.T * gate) @ b.T)


def test_scores_from_outside_are_the_logits():
    model = build("molora", router="external", router_init="kaiming_uniform", selection="top_k", renormalize=True)
    scores = torch.randn(3, 4)
    for given in (scores, scores.unsqueeze(1).expand(3, 6, 4)):
        with record_routing(model) as records, torch.no_grad():
            model(input_ids=tokens(), expert_scores=given)
        best = scores.topk(2).indices
        expected = torch.zeros(3, 4).scatter(-1, best, scores.gather(-1, best).softmax(dim=-1))
        for record in records:
            torch.testing.assert_close(record.routing.weights, expected.unsqueeze(1).expand_as(record.routing.weights))
            assert record.per_sequence == (given.ndim == 2)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_router_may_read_the_base_models_last_hidden_states(level):
    model = build("molora", router_input="base", router_level=level).double()
    with model.disable_adapter(), torch.no_grad():
        hidden = model.base_model.model.model(input_ids=tokens()).last_hidden_state
    with record_routing(model) as records, torch.no_grad():
        model(input_ids=tokens())
    read = hidden if level == "token" else hidden[:, -1:]
    for record, layer in zip(records, layers_of(model).values(), strict=True):
        weight = layer.router_of("default").weight
        torch.testing.assert_close(record.routing.logits, read @ weight.T)
    options = {"input_ids": tokens(), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    without_cache = model.generate(use_cache=False, **options)
    if level == "sequence":
        assert torch.equal(model.generate(**options), without_cache)
        return
    with pytest.raises(MoloraError, match=r"per token cannot decode with a cache; generate with use_cache=False"):
        model.generate(**options)
    alone = model.generate(use_cache=False, **{**options, "input_ids": tokens()[:1]})
    assert torch.equal(alone, without_cache[:1])
