"""Balancing losses: one value per linear, as slow fp64 loops give it; counts of the whole step; their controllers."""

from __future__ import annotations

import math

import pytest
import torch

from molora.losses import (
    adapted_coefficients,
    batch_entropy,
    importance,
    l1_sparsity,
    load,
    load_balancing,
    localized_balancing,
    mutual_information,
    next_coefficient,
    parameter_penalty,
    router_entropy,
    router_z,
)

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
TASKS = torch.tensor([1, 0, 1])
NOISE = 0.3


def top(values, k):
    return torch.zeros_like(values).scatter(-1, values.topk(k).indices, 1.0).bool()


def noise_like(logits):
    """The same draw at the same place of a row, whatever the number of linears and the padding."""
    batch, length, experts = logits.shape[-3:]
    draw = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (NOISE * draw[:batch, :length, :experts]).to(logits.dtype)


def tokens_of(mask, rows, length):
    return [(b, s) for b in range(rows) for s in range(length) if mask is None or mask[b, s]]


def of_softmax(loss):
    def run(logits, mask):
        probabilities = logits.softmax(-1)
        return loss(probabilities, top(probabilities, min(2, logits.shape[-1])), mask)

    return run


def of_noise(k):
    def run(logits, mask):
        noisy = logits + noise_like(logits)
        return load(logits, noisy, top(noisy, min(k, logits.shape[-1])), NOISE, mask)

    return run


def of_relu(logits, mask):
    gates = logits.relu()
    return l1_sparsity(gates, gates > 0, 1.5, mask)


LOSSES = {
    "load_balancing": of_softmax(load_balancing),
    "load_balancing in the batch": of_softmax(lambda p, s, m: load_balancing(p, s, m, scope="batch")),
    "load_balancing without counts": of_softmax(lambda p, s, m: load_balancing(p, s, m, scope="global")),
    "load_balancing with nulls": of_softmax(
        lambda p, s, m: load_balancing(p, s, m, scope="global", null_experts=min(2, p.shape[-1] - 1))
    ),
    "localized_balancing": of_softmax(
        lambda p, s, m: (
            localized_balancing(p, torch.arange(p.shape[-3]) % 2, m, groups=min(2, p.shape[-1]))
            if p.shape[-1] > 1
            else localized_balancing(p, torch.zeros(p.shape[-3], dtype=torch.long), m, groups=1)
        )
    ),
    "mutual_information": of_softmax(lambda p, s, m: mutual_information(p, torch.arange(p.shape[-3]) % 2, m)),
    "parameter_penalty": of_softmax(lambda p, s, m: parameter_penalty(p, s, range(1, p.shape[-1] + 1), m)),
    "router_entropy": of_softmax(lambda p, s, m: router_entropy(p, m)),
    "importance": of_softmax(lambda p, s, m: importance(p * s, m)),
    "router_z": router_z,
    "batch_entropy": of_softmax(lambda p, s, m: batch_entropy(p, m)),
    "load": of_noise(2),
    "load of all": of_noise(4),
    "l1_sparsity": of_relu,
}


def slow_batch_entropy(logits, mask):
    tokens = tokens_of(mask, *logits.shape[:2])
    value = math.log(logits.shape[-1])
    for e in range(logits.shape[-1]):
        mean = sum(logits[b, s, e].exp() / logits[b, s].exp().sum() for b, s in tokens) / len(tokens)
        value = value + mean * mean.log()
    return value


def slow_load(k):
    def run(logits, mask):
        noisy, experts, loads = logits + noise_like(logits), range(logits.shape[-1]), []
        for e in experts:
            total = 0.0
            for b, s in tokens_of(mask, *logits.shape[:2]):
                others = sorted((noisy[b, s, i] for i in experts if i != e), key=lambda v: -v.item())
                if k > len(others):
                    total = total + 1.0
                else:
                    total = total + (1 + torch.erf((logits[b, s, e] - others[k - 1]) / NOISE / math.sqrt(2))) / 2
            loads.append(total + 0 * logits.sum())
        mean = sum(loads) / len(loads)
        return sum((x - mean) ** 2 for x in loads) / len(loads) / mean**2

    return run


def slow_l1_sparsity(logits, mask):
    tokens, value = tokens_of(mask, *logits.shape[:2]), 0.0
    for b, s in tokens:
        for e in range(logits.shape[-1]):
            often = sum(1 for i, j in tokens if logits[i, j, e] > 0)
            value = value + logits.shape[-1] * often / (len(tokens) * 1.5) * logits[b, s, e].clamp(min=0)
    return value / len(tokens)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("name", "slow"),
    [
        ("batch_entropy", slow_batch_entropy),
        ("load", slow_load(2)),
        ("load of all", slow_load(4)),
        ("l1_sparsity", slow_l1_sparsity),
    ],
)
def test_value_and_gradient_equal_the_slow_loop(name, slow, mask):
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    got = LOSSES[name](logits, mask)
    expected = torch.stack([slow(one, mask) for one in logits])
    torch.testing.assert_close(got, expected)
    for weights in torch.eye(2, dtype=torch.float64):
        pair = [torch.autograd.grad(loss @ weights, logits, retain_graph=True)[0] for loss in (got, expected)]
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("name", LOSSES)
def test_each_linear_has_a_value_of_its_own_and_one_alone_has_one(name):
    logits = torch.randn(3, 3, 5, 4)
    logits[1] = torch.tensor([9.0, -9.0, -9.0, -9.0])
    got = LOSSES[name](logits, MASK)
    assert got.shape == (3,)
    torch.testing.assert_close(got, torch.cat([LOSSES[name](one, MASK) for one in logits]))
    assert LOSSES[name](logits.bfloat16(), MASK).dtype == torch.float32
    if name != "load of all":  # which is zero whatever the logits
        assert got[0] != got[1]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((2, 2, 3, 4), torch.zeros(2, 3).bool()),
        ((2, 2, 3, 1), None),
        ((2, 1, 1, 4), None),
        ((2, 1, 6, 4), torch.tensor([[0, 0, 1, 0, 0, 0]]).bool()),
    ],
    ids=["no real token", "one expert", "one token", "one real token"],
)
@pytest.mark.parametrize("scale", [0.0, 1.0, 400.0])
def test_degenerate_inputs_have_finite_values_and_gradients(name, shape, mask, scale):
    logits = (scale * torch.randn(shape)).requires_grad_()
    loss = LOSSES[name](logits, mask)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), logits)[0]).all()
    if mask is not None and not mask.any():
        assert (loss == 0).all()


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.relu])
@pytest.mark.parametrize("low", [-60.0, -85.0, -300.0])
@pytest.mark.parametrize(
    "loss", [batch_entropy, router_entropy, lambda p: load_balancing(p, p >= 0), lambda p: l1_sparsity(p, p > 0, 2)]
)
def test_gates_that_underflow_for_a_token_have_a_finite_gradient(loss, low, gate):
    logits = torch.full((1, 1, 1, 16), low, requires_grad=True)
    value = loss(gate(logits))
    assert torch.isfinite(value).all()
    assert torch.isfinite(torch.autograd.grad(value.sum(), logits)[0]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    logits, extra = torch.randn(2, 2, 6, 4), torch.full((2, 2, 3, 4), 3.0)
    mask = torch.nn.functional.pad(torch.ones(2, 6), (0, 3)).bool()
    torch.testing.assert_close(LOSSES[name](torch.cat([logits, extra], 2), mask), LOSSES[name](logits, None))


EVEN = torch.full((2, 8, 4), 0.25)
COLLAPSED = torch.tensor([1.0, 0, 0, 0]).expand(2, 8, 4)
IN_TURN = torch.eye(4).repeat(4, 1).reshape(2, 8, 4)
"""Every token is sure of one expert, and all experts get as many."""


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (batch_entropy(EVEN), 0),
        (batch_entropy(IN_TURN), 0),
        (batch_entropy(COLLAPSED), math.log(4)),
        (batch_entropy(COLLAPSED, torch.zeros(2, 8).bool()), 0),
        (load(9 * IN_TURN, 9 * IN_TURN, IN_TURN > 0, NOISE), 0),
        (load(9 * COLLAPSED, 9 * COLLAPSED, COLLAPSED > 0, NOISE), 3),
        (load(9 * COLLAPSED, 9 * COLLAPSED, COLLAPSED > 0, 0.0), 3),
        (l1_sparsity(IN_TURN, IN_TURN > 0, 1), 1),
        (l1_sparsity(COLLAPSED, COLLAPSED > 0, 1), 4),
        (l1_sparsity(3 * COLLAPSED, COLLAPSED > 0, 1), 12),
        (l1_sparsity(EVEN, EVEN > 0, 4), 1),
        (l1_sparsity(EVEN, EVEN > 0, 2), 2),
    ],
)
def test_value_at_balance_and_at_collapse(loss, value):
    assert loss.tolist() == pytest.approx([value], abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (batch_entropy, math.log(4)),
        (lambda p: load(9 * p, 9 * p, p > 0, NOISE), 3),
        (lambda p: l1_sparsity(p, p > 0, 1), 4),
        (lambda p: load_balancing(p, p > 0, scope="batch"), 4),
        (lambda p: load_balancing(p, p > 0, scope="global", counts=8 * p[:, 0, 0]), 4),
        (importance, 3),
    ],
)
def test_linears_that_collapse_onto_different_experts_are_not_called_balanced(loss, value):
    collapsed = torch.eye(4).reshape(4, 1, 1, 4).expand(4, 2, 4, 4)
    assert loss(collapsed).tolist() == pytest.approx([value] * 4)


def test_load_reaches_experts_that_were_not_selected():
    logits = torch.tensor([[[0.0, 0.1, 0.2, 0.3]]], requires_grad=True)
    loss = load(logits, logits.detach(), top(logits, 2), NOISE)
    assert (torch.autograd.grad(loss.sum(), logits)[0] != 0).all()


def test_what_l1_sparsity_counts_carries_no_gradient():
    gates = torch.tensor([[[0.5, 0.0], [0.5, 0.2]]], requires_grad=True)
    gradient = torch.autograd.grad(l1_sparsity(gates, gates > 0, 1).sum(), gates)[0]
    torch.testing.assert_close(gradient[0], torch.tensor([[1.0, 0.5], [1.0, 0.5]]))  # E F_e / T, alike for all tokens


@pytest.mark.parametrize("null_experts", [0, 2])
@pytest.mark.parametrize("count", ["selected", "first"])
def test_the_mean_global_loss_of_processes_is_that_of_their_tokens_together(count, null_experts):
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(-1)
    selected = top(probabilities, 2)
    kept = top(probabilities, 1) if count == "first" else selected
    counts = (kept & MASK.unsqueeze(-1)).sum(dim=(1, 2))
    options = {"scope": "global", "count": count, "null_experts": null_experts, "counts": counts}
    each = [
        load_balancing(probabilities[:, rows], selected[:, rows], MASK[rows], tokens=MASK.sum() / 3, **options)
        for rows in ([0], [1], [2])  # the last process has nothing but padding
    ]
    options = {"scope": "batch", "count": count, "null_experts": null_experts}
    expected = load_balancing(probabilities, selected, MASK, **options)
    torch.testing.assert_close(sum(each) / 3, expected)
    pair = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (sum(each) / 3, expected)]
    torch.testing.assert_close(*pair)


def test_global_counts_and_not_local_ones_say_which_expert_has_too_much():
    probabilities = torch.full((1, 1, 4, 2), 0.5, requires_grad=True)
    selected = torch.tensor([True, False]).expand(1, 1, 4, 2)
    counts = torch.tensor([[4, 12]])
    loss = load_balancing(probabilities, selected, scope="global", counts=counts)
    gradient = torch.autograd.grad(loss.sum(), probabilities)[0]
    assert (gradient[..., 1] > gradient[..., 0]).all()


def test_tokens_of_other_processes_alone_leave_a_process_without_gradient_or_nan():
    logits = torch.randn(2, 2, 3, 16, requires_grad=True)
    counts, nothing = torch.zeros(2, 16), torch.zeros(2, 3).bool()
    counts[:, 0] = 5e4
    probabilities = logits.softmax(-1)
    loss = load_balancing(
        probabilities, top(probabilities, 1), nothing, "global", counts=counts, tokens=torch.tensor(0.0)
    )
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize(
    ("active", "wanted", "alpha", "expected"),
    [
        (3.0, 2, 1.2, 1.2e-8),
        (2.0 + 1e-9, 2, 1.2, 1.2e-8),
        (2.0, 2, 1.2, 1e-8),
        (1.0, 2, 1.2, 1e-8 / 1.2),
        (0.0, 0.5, 2.0, 5e-9),
        (5.0, 2, 1.0, 1e-8),
    ],
)
def test_the_sparsity_coefficient_grows_while_too_many_experts_are_active(active, wanted, alpha, expected):
    assert next_coefficient(1e-8, active, wanted, alpha) == expected


@pytest.mark.parametrize(
    ("counts", "num_experts", "options", "dropped"),
    [
        ([5, 5, 5, 5], 4, {}, 0.0),
        ([20, 0, 0, 0], 4, {}, 0.75),
        ([10, 10, 0, 0], 4, {}, 0.5),
        ([10, 10, 0, 0], 2, {}, 0.0),  # two experts, and columns of a wider linear
        ([20, 0, 0, 0], 2, {}, 0.5),
        ([20, 0, 0, 0], 4, {"capacity": 1.5}, 0.625),
        ([20, 0, 0, 0], 4, {"capacity": 4.0}, 0.0),
        ([20, 0, 0, 0], 4, {"factor": 0.001}, 0.75),
        ([20, 0, 0, 0], 4, {"maximum": 0.5, "decay": 0.5}, 0.75),
    ],
)
def test_adapted_coefficients_follow_the_share_that_would_be_dropped(counts, num_experts, options, dropped):
    given = {"factor": 0.2, "maximum": 0.01, "decay": 0.99, **options}
    start = torch.tensor([0.004], dtype=torch.float64)
    got = adapted_coefficients(start, torch.tensor([counts]), num_experts, **options)
    aim = min(given["factor"] * dropped, given["maximum"])
    assert got.tolist() == pytest.approx([given["decay"] * 0.004 + (1 - given["decay"]) * aim])


def test_each_linear_adapts_by_its_own_counts_and_experts_and_stays_where_nothing_was_counted():
    start = torch.tensor([0.004, 0.004, 0.004])
    counts = torch.tensor([[8, 8, 0, 0], [8, 8, 0, 0], [0, 0, 0, 0]])
    got = adapted_coefficients(start, counts, torch.tensor([2, 4, 4]))
    assert got.tolist() == pytest.approx([0.99 * 0.004, 0.99 * 0.004 + 0.01 * 0.01, 0.004])
