"""Losses that contrast routers with tokens, gates of sequences, and two passes: as slow fp64 loops give them."""

from __future__ import annotations

import math

import pytest
import torch

from molora.errors import MoloraError
from molora.losses import consistency, gate_contrastive, routing_contrastive
from molora.losses.routing_contrastive import token_sums

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1]]).bool()
TASKS = torch.tensor([1, 0, 1, 1])


def cosine(a, b):
    dot = [sum(x * y for x, y in zip(left, right, strict=True)) for left, right in ((a, b), (a, a), (b, b))]
    return dot[0] / (dot[1].sqrt() * dot[2].sqrt())


def top(values, k):
    return torch.zeros_like(values).scatter(-1, values.topk(k).indices, 1.0).bool()


# Routing contrastive.


def slow_routing_contrastive(rows, x, selected, tau):
    """Means of the tokens of each expert, one after the other, and a cross-entropy over those that have some."""
    means = {}
    for e in range(len(rows)):
        own = [token for token, kept in zip(x, selected, strict=True) if kept[e]]
        if own:
            means[e] = sum(own) / len(own)
    values = []
    for i in means:
        scores = {j: (cosine(rows[i], mean) / tau).exp() for j, mean in means.items()}
        values.append(-(scores[i] / sum(scores.values())).log())
    return sum(values) / len(values) if values else torch.zeros((), dtype=x.dtype)


@pytest.mark.parametrize("unused", [[], [0], [1, 3], [0, 1, 2], [0, 1, 2, 3]])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_routing_contrastive_equals_the_slow_loop(unused, tau):
    rows = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    selected = top(torch.randn(2, 10, 4), 2)
    selected[0, :, unused] = False
    sums, counts = zip(*[token_sums(*one) for one in zip(x, selected, strict=True)], strict=True)
    got = routing_contrastive(rows, torch.stack(sums), torch.stack(counts), tau)
    expected = torch.stack([slow_routing_contrastive(*one, tau) for one in zip(rows, x, selected, strict=True)])
    torch.testing.assert_close(got, expected)
    for weights in torch.eye(2, dtype=torch.float64):
        pair = [torch.autograd.grad(loss @ weights, rows, retain_graph=True)[0] for loss in (got, expected)]
        torch.testing.assert_close(*pair)


TOKENS = torch.eye(3)


@pytest.mark.parametrize(
    ("rows", "sums", "counts", "value"),
    [
        (TOKENS, 5 * TOKENS, [5, 5, 5], math.log(1 + 2 * math.exp(-1 / 0.07))),
        (3 * TOKENS, TOKENS, [1, 9, 1], math.log(1 + 2 * math.exp(-1 / 0.07))),
        (TOKENS[[0, 0, 0]], TOKENS, [1, 1, 1], math.log(1 + 2 * math.exp(-1 / 0.07)) + 2 / 0.07 / 3),
        (TOKENS, TOKENS[[0, 0, 0]], [4, 4, 4], math.log(3)),
        (TOKENS, TOKENS[[0, 0, 0]], [4, 4, 0], math.log(2)),
        (TOKENS, TOKENS, [4, 0, 0], 0),
        (TOKENS, TOKENS * 0, [0, 0, 0], 0),
        (TOKENS * 0, TOKENS, [1, 1, 1], math.log(3)),
        (TOKENS, TOKENS * 0, [1, 1, 1], math.log(3)),
    ],
    ids=["own", "scaled", "rows alike", "means alike", "two used", "one used", "none used", "no rows", "zero means"],
)
def test_routing_contrastive_where_rows_meet_their_tokens_and_where_they_do_not(rows, sums, counts, value):
    rows = rows.unsqueeze(0).clone().requires_grad_()
    got = routing_contrastive(rows, sums.unsqueeze(0), torch.tensor([counts]))
    assert got.tolist() == pytest.approx([value], abs=1e-5)
    gradient = torch.autograd.grad(got.sum(), rows)[0]
    assert torch.isfinite(gradient).all()
    if not rows.any():
        assert (gradient == 0).all()


def test_linears_with_opposite_rows_are_not_mixed():
    rows = torch.stack([TOKENS, TOKENS.flip(0)])
    got = routing_contrastive(rows, TOKENS.expand(2, 3, 3), torch.ones(2, 3))
    assert got[0] < 1e-5
    assert got[1] > 1


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("autocast", [False, True])
def test_token_sums_are_exact_and_carry_no_gradient(mask, autocast):
    x = torch.randn(4, 5, 6).bfloat16().requires_grad_()
    selected = top(torch.randn(4, 5, 3), 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sums, counts = token_sums(x, selected, mask)
    assert not sums.requires_grad
    assert sums.dtype == counts.dtype == torch.float32
    for e in range(3):
        own = [(b, s) for b in range(4) for s in range(5) if selected[b, s, e] and (mask is None or mask[b, s])]
        assert counts[e] == len(own)
        torch.testing.assert_close(sums[e], sum(x[b, s].float() for b, s in own).detach())


def test_token_sums_of_sequences_of_all_shapes_agree():
    x, selected = torch.randn(4, 5, 6), top(torch.randn(4, 5, 3), 1)
    expected = token_sums(x, selected, MASK)
    torch.testing.assert_close(token_sums(x.flatten(0, 1), selected.flatten(0, 1), MASK.flatten()), expected)


# Gate contrastive.


def slow_gate_contrastive(logits, mask, tau, other=None, tasks=None):
    """By sequence: its mean share, then the scores against all that count."""
    real = [b for b in range(len(mask)) if mask[b].any()]
    pool = {b: sum(logits[b, s].exp() / logits[b, s].exp().sum() for s in range(5) if mask[b, s]) for b in real}
    against = pool
    if other is not None:
        against = {b: sum(other[b, s].exp() / other[b, s].exp().sum() for s in range(5) if mask[b, s]) for b in real}
    values = []
    for b in real:
        rivals = [c for c in real if other is not None or c != b]
        positives = [c for c in rivals if (c == b if tasks is None else tasks[c] == tasks[b])]
        if positives:
            total = sum((cosine(pool[b], against[c]) / tau).exp() for c in rivals)
            each = [-((cosine(pool[b], against[c]) / tau).exp() / total).log() for c in positives]
            values.append(sum(each) / len(each))
    return sum(values) / len(values)


@pytest.mark.parametrize("mask", [torch.ones(4, 5).bool(), MASK], ids=["all", "masked"])
@pytest.mark.parametrize("way", ["view", "task"])
def test_gate_contrastive_equals_the_slow_loop(way, mask):
    logits, other = (torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if way == "view":
        got = gate_contrastive(logits.softmax(-1), mask, view=other.softmax(-1), temperature=0.5)
        expected = [slow_gate_contrastive(a, mask, 0.5, b) for a, b in zip(logits, other, strict=True)]
    else:
        got = gate_contrastive(logits.softmax(-1), mask, task_ids=TASKS, temperature=0.5)
        expected = [slow_gate_contrastive(a, mask, 0.5, tasks=TASKS) + 0 * other.sum() for a in logits]
        got = got + 0 * other.sum()
    expected = torch.stack(expected)
    torch.testing.assert_close(got, expected)
    for weights in torch.eye(2, dtype=torch.float64):
        each = [torch.autograd.grad(loss @ weights, (logits, other), retain_graph=True) for loss in (got, expected)]
        torch.testing.assert_close(*each)


EVEN = torch.full((4, 2, 4), 0.25)
APART = torch.eye(4).unsqueeze(1).expand(4, 2, 4)
PAIRS = torch.eye(4)[[0, 0, 1, 1]].unsqueeze(1).expand(4, 2, 4)


@pytest.mark.parametrize(
    ("gates", "given", "value"),
    [
        (EVEN, {"view": EVEN}, math.log(4)),
        (APART, {"view": APART}, math.log(1 + 3 * math.exp(-10))),
        (APART, {"view": APART.roll(1, 0)}, 10 + math.log(1 + 3 * math.exp(-10))),
        (EVEN, {"task_ids": torch.tensor([5, 5, 9, 9])}, math.log(3)),
        (PAIRS, {"task_ids": torch.tensor([5, 5, 9, 9])}, math.log(1 + 2 * math.exp(-10))),
        (PAIRS, {"task_ids": torch.tensor([5, 9, 5, 9])}, math.log(2 + math.exp(10))),
        (EVEN, {"task_ids": torch.tensor([5, 5, 5, 5])}, math.log(3)),
        (EVEN, {"task_ids": torch.tensor([1, 2, 3, 4])}, 0),
        (EVEN, {"task_ids": torch.tensor([1, 1, 3, 4])}, math.log(3)),
        (EVEN[:1], {"view": EVEN[:1]}, 0),
        (EVEN[:1], {"task_ids": torch.tensor([1])}, 0),
    ],
)
def test_gate_contrastive_where_sequences_are_routed_alike_and_apart(gates, given, value):
    gates = gates.clone().requires_grad_()
    got = gate_contrastive(gates, None, **given)
    assert got.tolist() == pytest.approx([value], abs=1e-5)
    assert torch.isfinite(torch.autograd.grad(got.sum(), gates)[0]).all()


@pytest.mark.parametrize("given", [{"view": torch.rand(2, 4, 5, 3)}, {"task_ids": torch.tensor([0, 0, 0, 1])}])
@pytest.mark.parametrize(
    "mask", [torch.zeros(4, 5).bool(), torch.tensor([1, 0, 0, 0]).bool().unsqueeze(1).expand(4, 5)]
)
def test_gate_contrastive_of_fewer_than_two_real_sequences_is_zero(given, mask):
    gates = torch.rand(2, 4, 5, 3, requires_grad=True)
    got = gate_contrastive(gates, mask, **given)
    assert got.tolist() == [0, 0]
    assert (torch.autograd.grad(got.sum(), gates)[0] == 0).all()


@pytest.mark.parametrize("way", ["view", "task"])
def test_gate_contrastive_is_blind_to_padding_and_to_other_linears(way):
    gates, view = torch.rand(2, 4, 5, 3), torch.rand(2, 4, 5, 3)
    mask = torch.nn.functional.pad(torch.ones(3, 5), (0, 2, 0, 1)).bool()

    def run(gates, view, mask=None):
        given = {"view": view} if way == "view" else {"task_ids": TASKS[: gates.shape[-3]]}
        return gate_contrastive(gates, mask, **given)

    longer = [torch.nn.functional.pad(values, (0, 0, 0, 2), value=9.0) for values in (gates, view)]
    torch.testing.assert_close(run(*longer, mask), run(gates[:, :3], view[:, :3]))
    torch.testing.assert_close(run(gates, view), torch.cat([run(*one) for one in zip(gates, view, strict=True)]))


@pytest.mark.parametrize(("given", "words"), [({}, "neither"), ({"view": EVEN, "task_ids": torch.arange(4)}, "both")])
def test_gate_contrastive_asks_for_either_a_view_or_tasks(given, words):
    with pytest.raises(MoloraError, match=words):
        gate_contrastive(EVEN, None, **given)


# Consistency.


def slow_consistency(first, second, mask):
    values = []
    for p, q, real in zip(first.flatten(0, 1), second.flatten(0, 1), mask.flatten(), strict=True):
        if real:
            p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
            there, back = sum(p[v] * (p[v] / q[v]).log() for v in range(7)), sum(q * (q / p).log())
            values.append((there + back) / 2)
    return sum(values) / len(values)


@pytest.mark.parametrize("mask", [None, MASK])
def test_consistency_equals_the_slow_loop_and_both_passes_learn(mask):
    first, second = (torch.randn(4, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = consistency(first, second, mask)
    expected = slow_consistency(first, second, torch.ones(4, 5) if mask is None else mask)
    torch.testing.assert_close(got, expected)
    each = [torch.autograd.grad(loss, (first, second)) for loss in (got, expected)]
    torch.testing.assert_close(*each)
    assert all(gradient.any() for gradient in each[0])


def test_consistency_of_equal_passes_is_zero_and_of_contradicting_ones_is_their_distance():
    logits = torch.randn(2, 3, 7)
    assert consistency(logits, logits + 5.0).item() == pytest.approx(0, abs=1e-6)
    sure = torch.tensor([[50.0, 0.0]])
    assert consistency(sure, sure.flip(-1)).item() == pytest.approx(50)
    assert consistency(sure.bfloat16(), sure.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("mask", "scale"), [(torch.zeros(2, 3).bool(), 1.0), (None, 0.0), (None, 1e4)], ids=["no token", "even", "large"]
)
def test_consistency_is_finite_where_there_is_nothing_to_compare_and_far_apart(mask, scale):
    first, second = ((scale * torch.randn(2, 3, 7)).requires_grad_() for _ in range(2))
    got = consistency(first, second, mask)
    assert torch.isfinite(got)
    assert mask is None or got == 0
    assert all(torch.isfinite(one).all() for one in torch.autograd.grad(got, (first, second)))


def test_consistency_samples_real_tokens_only():
    first, second = torch.randn(2, 20, 7), torch.randn(2, 20, 7)
    mask = torch.arange(20).expand(2, 20) % 3 == 0
    first[mask], second[mask] = torch.randn(7), torch.randn(7)
    expected = consistency(first, second, mask, max_tokens=None)
    for max_tokens in (1, 14, 30, 40, 256):
        torch.testing.assert_close(consistency(first, second, mask, max_tokens), expected)
    assert consistency(first, second, None, 5) != consistency(first, second, None, 5)
