"""Losses between experts: as slow fp64 loops over whole outputs give them, without ever computing those."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from molora.losses import expert_contrastive, expert_orthogonality, output_orthogonality, router_orthogonality

COLUMNS = torch.tensor([0, 1, 1, 2, 0, 3, 2, 3, 3])
"""Ranks 2, 2, 2 and 3, not in order."""
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 0]).bool()
TAU = 0.1


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a, b):
    return dot(a, b) / (dot(a, a).sqrt() * dot(b, b).sqrt())


def outputs_of(z, up):
    """What each expert says about one token: `e_i = B_i z_i`, by loops over its columns."""
    return [
        sum(z[c] * up[:, c] for c in range(len(COLUMNS)) if COLUMNS[c] == e) for e in range(int(COLUMNS.max()) + 1)
    ]


def slow_expert_contrastive(z, up, selected, mask):
    values = []
    for t in range(len(z)):
        active = [e for e in range(4) if selected[t, e]]
        inactive = [e for e in range(4) if not selected[t, e]]
        if not mask[t] or len(active) < 2 or not inactive:
            continue
        said = outputs_of(z[t], up)
        for i in active:
            negatives = sum((cosine(said[i], said[n]) / TAU).exp() for n in inactive)
            positives = [(cosine(said[i], said[p]) / TAU).exp() for p in active if p != i]
            values.append(sum(-(one / (one + negatives)).log() for one in positives) / len(positives))
    return sum(values) / len(values)


def slow_output_orthogonality(z, up, selected, mask):
    values = []
    for t in range(len(z)):
        said = outputs_of(z[t], up)
        for i in range(4):
            for j in range(i):
                if mask[t] and selected[t, i] and selected[t, j]:
                    values.append(cosine(said[i], said[j]) ** 2)
    return sum(values) / len(values)


SLOW = {expert_contrastive: slow_expert_contrastive, output_orthogonality: slow_output_orthogonality}
BOTH = pytest.mark.parametrize("loss", SLOW)


def case(linears=2, tokens=7, experts=4, out=6, dtype=torch.float64):
    """Hidden, B, and selections of one to all experts."""
    z = torch.randn(linears, tokens, len(COLUMNS), dtype=dtype)
    up = torch.randn(linears, out, len(COLUMNS), dtype=dtype)
    selected = torch.rand(linears, tokens, experts) < 0.55
    few = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]).bool()[:tokens]
    selected[:, : len(few)] = few
    return z, up, selected


@BOTH
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_value_and_gradient_equal_loops_over_whole_outputs(loss, mask):
    z, up, selected = case()
    z.requires_grad_(), up.requires_grad_()
    got = loss(z, up, selected, COLUMNS, mask)
    real = torch.ones(7).bool() if mask is None else mask
    expected = torch.stack([SLOW[loss](*one, real) for one in zip(z, up, selected, strict=True)])
    torch.testing.assert_close(got, expected)
    for weights in torch.eye(2, dtype=torch.float64):
        each = [torch.autograd.grad(value @ weights, (z, up), retain_graph=True) for value in (got, expected)]
        torch.testing.assert_close(*each)


@BOTH
def test_gradients_are_those_of_finite_differences(loss):
    z, up, selected = case(linears=1, tokens=4)
    assert torch.autograd.gradcheck(
        lambda *inputs: loss(*inputs, selected, COLUMNS), (z.requires_grad_(), up.requires_grad_())
    )


@BOTH
def test_a_sample_looks_at_real_tokens_only_and_at_the_same_for_all_linears(loss):
    z, up, selected = case(linears=1, tokens=1)
    z, selected = z.expand(2, 40, -1).clone(), selected.expand(2, 40, -1)
    up = up.expand(2, -1, -1)
    mask = torch.arange(40) % 4 == 0
    z[:, ~mask] = torch.randn_like(z[:, ~mask])
    expected = loss(z[:, :1], up, selected[:, :1], COLUMNS)
    for max_tokens in (1, 10, 25, 40, None):  # fewer than are real, as many, more, all
        torch.testing.assert_close(loss(z, up, selected, COLUMNS, mask, max_tokens=max_tokens), expected)
    z, up, selected = case(linears=1, tokens=40)
    again = loss(z.expand(2, -1, -1), up.expand(2, -1, -1), selected.expand(2, -1, -1), COLUMNS, max_tokens=8)
    torch.testing.assert_close(again[0], again[1])
    whole = loss(z, up, selected, COLUMNS, max_tokens=None)
    samples = torch.cat([loss(z, up, selected, COLUMNS, max_tokens=20) for _ in range(100)])
    assert samples.std() > 1e-3
    assert samples.mean() == pytest.approx(whole.item(), abs=4 * samples.std().item() / 10 + 0.01)


@BOTH
def test_columns_of_shared_experts_count_for_none(loss):
    z, up, selected = case()
    expected = loss(z, up, selected, COLUMNS)
    z, up = torch.nn.functional.pad(z, (0, 2), value=3.0), torch.nn.functional.pad(up, (0, 2), value=2.0)
    torch.testing.assert_close(loss(z, up, selected, torch.cat([COLUMNS, torch.tensor([4, 4])])), expected)


@BOTH
def test_bfloat16_and_autocast_lose_no_precision(loss):
    z, up, selected = case(dtype=torch.bfloat16)
    expected = loss(z.double(), up.double(), selected, COLUMNS)
    got = loss(z, up, selected, COLUMNS)
    assert got.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        again = loss(z, up, selected, COLUMNS)
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, got)


NONE, ONE, ALL = (torch.tensor(row).bool() for row in ([0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "zero"),
    [
        (lambda z, up, s, m: (z, up * 0, s, m), None),
        (lambda z, up, s, m: (z * 0, up, s, m), None),
        (lambda z, up, s, m: (z, up * (COLUMNS != 1), s, m), None),
        (lambda z, up, s, m: (z, up * 1e-6, s, m), None),
        (lambda z, up, s, m: (z, up, s, m * False), "zero"),
        (lambda z, up, s, m: (z, up, s & NONE, m), "zero"),
        (lambda z, up, s, m: (z, up, (s | ALL) & ONE, m), "zero"),
        (lambda z, up, s, m: (z, up, s | ALL, m), None),
        (lambda z, up, s, m: (z[:, :1], up, s[:, :1], m[:1]), None),
        (lambda z, up, s, m: (z, up, s[..., :1], m), "zero"),
    ],
    ids=["B=0", "z=0", "one silent", "small", "no token", "none", "one", "all", "one token", "one expert"],
)
def test_degenerate_inputs_have_finite_values_and_gradients(loss, change, zero, dtype):
    z, up, selected = case(dtype=dtype)
    z.requires_grad_(), up.requires_grad_()
    *given, mask = change(z, up, selected, MASK)
    value = loss(*given, COLUMNS, mask)
    assert torch.isfinite(value).all()
    if zero:
        assert (value == 0).all()
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way to it either
        gradients = torch.autograd.grad(value.sum(), (z, up))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@BOTH
def test_while_b_is_zero_nothing_is_learned_and_nothing_explodes(loss):
    z, up, selected = case(dtype=torch.float32)
    up = torch.zeros_like(up).requires_grad_()
    assert (torch.autograd.grad(loss(z, up, selected, COLUMNS).sum(), up)[0] == 0).all()


@BOTH
def test_outputs_that_cancel_up_to_rounding_have_no_direction(loss):
    """Two equal columns with opposite hidden: what is left of the products is noise, and its cosine would be too."""
    columns = torch.tensor([0, 0, 1, 2])
    z = torch.tensor([[[1.0, -1.0, 1.0, 1.0]]])
    up = torch.randn(1, 64, 4)
    up[..., 1] = up[..., 0] * (1 + 1e-7)
    up = up.requires_grad_()
    value = loss(z, up, torch.tensor([[[True, True, False]]]), columns)
    assert 0 <= value.item() < 1 / TAU + math.log(2)
    assert torch.autograd.grad(value.sum(), up)[0].abs().max() < 1e3


def directions(*vectors):
    """One token, one column per expert, with these outputs."""
    up = torch.tensor(vectors, dtype=torch.float64).T.unsqueeze(0)
    return torch.ones(1, 1, len(vectors), dtype=torch.float64), up, torch.arange(len(vectors))


X, Y, Z = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]
MINUS = [-1.0, 0, 0]


@pytest.mark.parametrize(
    ("loss", "outputs", "active", "value"),
    [
        (expert_contrastive, (X, X, X, X), [1, 1, 0, 0], math.log(3)),
        (expert_contrastive, (X, X, Y, Z), [1, 1, 0, 0], math.log(1 + 2 * math.exp(-10))),
        (expert_contrastive, (X, Y, X, X), [1, 1, 0, 0], (math.log(1 + 2 * math.exp(10)) + math.log(3)) / 2),
        (expert_contrastive, (X, X, MINUS, MINUS), [1, 1, 0, 0], math.log(1 + 2 * math.exp(-20))),
        (expert_contrastive, (X, X, X, X), [1, 1, 1, 0], math.log(2)),
        (expert_contrastive, (X, X, X, X), [1, 0, 0, 0], 0),
        (expert_contrastive, (X, X, X, X), [1, 1, 1, 1], 0),
        (output_orthogonality, (X, X, X, X), [1, 1, 0, 0], 1),
        (output_orthogonality, (X, MINUS, Y, Y), [1, 1, 0, 0], 1),
        (output_orthogonality, (X, Y, Y, Y), [1, 1, 0, 0], 0),
        (output_orthogonality, (X, Y, Y, Y), [1, 1, 1, 0], 1 / 3),
        (output_orthogonality, (X, X, X, X), [1, 0, 0, 0], 0),
    ],
)
def test_value_where_outputs_agree_and_where_they_are_apart(loss, outputs, active, value):
    z, up, columns = directions(*outputs)
    got = loss(z, up, torch.tensor([[active]]).bool(), columns)
    assert got.tolist() == pytest.approx([value], abs=1e-9)


@BOTH
def test_each_linear_has_a_value_of_its_own(loss):
    z, up, selected = case(linears=3)
    each = [loss(z[i : i + 1], up[i : i + 1], selected[i : i + 1], COLUMNS, MASK) for i in range(3)]
    torch.testing.assert_close(loss(z, up, selected, COLUMNS, MASK), torch.cat(each))


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that any operation made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, list | tuple) else [made]:
            if isinstance(value, torch.Tensor):
                self.entries = max(self.entries, value.numel())
        return made


@BOTH
def test_outputs_are_never_computed(loss):
    tokens, out = 64, 512
    z, up, selected = case(tokens=tokens, out=out, dtype=torch.float32)
    z.requires_grad_(), up.requires_grad_()
    with Largest() as largest:
        loss(z, up, selected, COLUMNS).sum().backward()
    assert largest.entries <= max(up.numel(), z.numel() * 4, 2 * tokens * 4 * 4)
    assert largest.entries < 2 * tokens * 4 * out / 8
    with Largest() as largest:  # and the test would see it
        torch.einsum("ltec,loc->lteo", z.unsqueeze(2).expand(-1, -1, 4, -1), up)
    assert largest.entries >= 2 * tokens * 4 * out


def slow_expert_orthogonality(matrix, experts):
    pairs = []
    for i in range(experts):
        for j in range(experts):
            if i != j:
                of_i, of_j = ([row for row, e in zip(matrix, COLUMNS, strict=True) if e == k] for k in (i, j))
                squares = [cosine(a, b) ** 2 for a in of_i for b in of_j]
                pairs.append(sum(squares) / len(squares))
    return sum(pairs) / len(pairs)


def test_expert_orthogonality_equals_the_slow_loop_and_finite_differences():
    matrix = torch.randn(2, len(COLUMNS), 5, dtype=torch.float64, requires_grad=True)
    got = expert_orthogonality(matrix, COLUMNS, 4)
    torch.testing.assert_close(got, torch.stack([slow_expert_orthogonality(one, 4) for one in matrix]))
    assert torch.autograd.gradcheck(lambda m: expert_orthogonality(m, COLUMNS, 4), (matrix,))
    # Rows of a shared expert count for none.
    more = torch.cat([matrix, matrix[:, :1]], 1)
    torch.testing.assert_close(expert_orthogonality(more, torch.cat([COLUMNS, torch.tensor([4])]), 4), got)


def test_router_orthogonality_equals_the_distance_from_the_identity_and_finite_differences():
    rows = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    got = router_orthogonality(rows)
    for one, value in zip(rows, got, strict=True):
        gram = torch.tensor([[cosine(a, b).item() for b in one] for a in one], dtype=torch.float64)
        assert value.item() == pytest.approx(((gram - torch.eye(4)).norm() ** 2 / 12).item())
    assert torch.autograd.gradcheck(router_orthogonality, (rows,))


def by_rows(rows):
    return expert_orthogonality(rows, torch.arange(rows.shape[1]), rows.shape[1])


@pytest.mark.parametrize("loss", [by_rows, router_orthogonality])
@pytest.mark.parametrize(
    ("rows", "value"),
    [
        ([X, Y, Z], 0),
        ([X, X, X], 1),
        ([X, MINUS, X], 1),
        ([X, X, Y], 1 / 3),
        ([X], 0),
        ([[0.0, 0, 0], [0.0, 0, 0]], 0),
        ([[0.0, 0, 0], X], 0),
        ([[1e-9, 0, 0], [5e8, 0, 0]], 1),
    ],
)
def test_rows_that_are_orthogonal_cost_nothing_and_parallel_ones_1(loss, rows, value):
    rows = torch.tensor([rows]).requires_grad_()
    got = loss(rows)
    assert got.tolist() == pytest.approx([value])
    assert torch.isfinite(torch.autograd.grad(got.sum(), rows)[0]).all()


@pytest.mark.parametrize("loss", [by_rows, router_orthogonality])
def test_rows_keep_their_precision_under_autocast(loss):
    rows = torch.randn(1, 4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(rows), loss(rows.double()).float())
    assert loss(rows.bfloat16()).dtype == torch.float32
