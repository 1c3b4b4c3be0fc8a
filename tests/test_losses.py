"""Every loss means what its docstring says: values and gradients as slow loops give them, padding without effect."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from molora import losses as losses_module
from molora.errors import MoloraError
from molora.losses import (
    LOSSES,
    TASK_IDS,
    Choice,
    LossInputs,
    Number,
    load_balancing,
    localized_balancing,
    loss_needs,
    option_problem,
    total_loss,
)
from molora.losses.parameter_penalty import parameter_penalty
from molora.routing.masks import TokenMasks
from molora.routing.record import RoutingRecord
from molora.routing.route import Routing
from molora.routing.selection import top_p
from molora.routing.stacked import stack_records

SIZES = (2, 4, 8, 2)
TASKS = [1, 0, 1]
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()


def one_hot(experts, num_experts=4):
    return torch.nn.functional.one_hot(torch.tensor(experts), num_experts).bool()


def recorded(logits, mask=None, gate="softmax", null_experts=0, layer="a", sizes=SIZES):
    """A record of one linear, with every expert above 0.2 selected."""
    probabilities = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    selected = probabilities.detach() > 0.2
    weights = (probabilities * selected)[..., : logits.shape[-1] - null_experts]
    routing = Routing(logits, probabilities, selected, weights)
    return RoutingRecord(layer, "default", routing, TokenMasks(mask), sizes, null_experts)


def stacked(logits, mask, **fields):
    """Linears `[L, B, S, E]` under one mask."""
    masks = TokenMasks(mask)
    records = [recorded(one, mask, layer=str(index), **fields) for index, one in enumerate(logits)]
    return stack_records(RoutingRecord(r.layer, r.adapter, r.routing, masks, r.sizes, r.null_experts) for r in records)


class Slow:
    """Loops over sequences, tokens and experts of one linear."""

    def __init__(self, record, mask, tasks):
        self.logits, self.mask, self.tasks = record.routing.logits, mask, tasks
        self.probabilities, self.selected = record.routing.probabilities, record.routing.selected
        self.weights, self.nulls, self.sizes = record.routing.weights, record.null_experts, record.sizes
        self.batch, self.length, self.columns = self.logits.shape
        self.experts = self.columns - self.nulls

    def groups(self, scope):
        rows = [[(b, s) for s in range(self.length) if mask_row[s]] for b, mask_row in enumerate(self.mask)]
        rows = [row for row in rows if row]
        return rows if scope == "sequence" else [[token for row in rows for token in row]]

    def share(self, b, s, e):
        return self.probabilities[b, s, e] / self.probabilities[b, s].sum()

    def mean_share(self, tokens, e):
        return sum(self.share(b, s, e) for b, s in tokens) / len(tokens)

    def load_balancing(self, scope="sequence", count="selected"):
        values = []
        for tokens in self.groups(scope):
            counts = [0.0] * self.columns
            for b, s in tokens:
                chosen = [e for e in range(self.columns) if self.selected[b, s, e]]
                if count == "first" and chosen:
                    chosen = [max(chosen, key=lambda e, b=b, s=s: self.probabilities[b, s, e].item())]
                for e in chosen:
                    counts[e] += 1.0
            if self.nulls:
                mean = sum(counts[self.experts :]) / self.nulls
                counts[self.experts :] = [mean] * self.nulls
            shares = [c / sum(counts) * self.mean_share(tokens, e) for e, c in enumerate(counts)]
            values.append(self.columns * sum(shares))
        return sum(values) / len(values)

    def parameter_penalty(self, scope="sequence"):
        values = []
        for tokens in self.groups(scope):
            value = 0.0
            for e in range(self.experts):
                size = self.sizes[e] / (sum(self.sizes) / len(self.sizes))
                often = sum(self.selected[b, s, e].item() for b, s in tokens) / len(tokens)
                value = value + often * size * self.mean_share(tokens, e)
            values.append(self.experts * value)
        return sum(values) / len(values)

    def localized_balancing(self, delta=0.1, form="cv2", groups=2):
        entries = []
        for tokens in self.groups("sequence"):
            for e in range(self.experts):
                q = sum(self.probabilities[b, s, e] for b, s in tokens) / len(tokens)
                own = e // (self.experts // groups) == self.tasks[tokens[0][0]]
                entries.append(q * (1 + delta if own else 1 - delta))
        entries = torch.stack(entries)
        mean = entries.mean()
        return entries.var() / (mean * mean if form == "cv2" else mean)

    def mutual_information(self):
        tokens = self.groups("batch")[0]
        joint = {}
        for b, s in tokens:
            for e in range(self.columns):
                key = self.tasks[b], e
                joint[key] = joint.get(key, 0.0) + self.share(b, s, e) / len(tokens)
        value = 0.0
        for (task, e), p in joint.items():
            of_task = sum(q for (k, _), q in joint.items() if k == task)
            of_expert = sum(q for (_, i), q in joint.items() if i == e)
            value = value + p * (p / (of_task * of_expert)).log()
        return -value

    def router_entropy(self):
        tokens = self.groups("batch")[0]
        shares = [self.share(b, s, e) for b, s in tokens for e in range(self.columns)]
        return -sum(p * p.log() for p in shares) / len(tokens)

    def importance(self):
        mass = torch.stack([sum(self.weights[b, s, e] for b, s in self.groups("batch")[0]) for e in range(4)])
        return ((mass - mass.mean()) ** 2).mean() / mass.mean() ** 2

    def router_z(self):
        tokens = self.groups("batch")[0]
        return sum(self.logits[b, s].exp().sum().log() ** 2 for b, s in tokens) / len(tokens)


CASES = [
    ("load_balancing", {}),
    ("load_balancing", {"scope": "batch"}),
    ("load_balancing", {"scope": "batch", "count": "first"}),
    ("load_balancing", {"count": "first"}),
    ("localized_balancing", {}),
    ("localized_balancing", {"delta": 0.5, "form": "variance_over_mean", "groups": 4}),
    ("mutual_information", {}),
    ("parameter_penalty", {}),
    ("parameter_penalty", {"scope": "batch"}),
    ("router_entropy", {}),
    ("importance", {}),
    ("router_z", {}),
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("null_experts", [0, 2])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_gradient_equal_the_slow_loop(name, options, null_experts, gate, reduction):
    logits = torch.randn(2, 3, 5, 4 + null_experts, requires_grad=True)
    stacks = stacked(logits, MASK, gate=gate, null_experts=null_experts)
    setting = {"coefficient": 1.0, "layer_reduction": reduction, **options}
    got, _ = total_loss(stacks, {name: setting}, LossInputs(torch.tensor(TASKS)))
    records = [recorded(one, gate=gate, null_experts=null_experts) for one in logits]
    each = [getattr(Slow(record, MASK, TASKS), name)(**options) for record in records]
    expected = sum(each) / (1 if reduction == "sum" else len(each))
    torch.testing.assert_close(got, expected)
    for a, b in zip(*(torch.autograd.grad(loss, logits, retain_graph=True) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_changes_no_loss(name, options):
    logits, inputs = torch.randn(1, 2, 6, 4), LossInputs(torch.tensor([0, 1]))
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 3), value=3.0)
    mask = torch.nn.functional.pad(torch.ones(2, 6), (0, 3)).bool()
    losses = {name: {"coefficient": 1.0, **options}}
    expected, _ = total_loss(stacked(logits, None), losses, inputs)
    assert total_loss(stacked(padded, mask), losses, inputs)[0] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_batch_of_nothing_but_padding_is_zero_not_nan(name, options):
    logits = torch.randn(1, 2, 3, 4, requires_grad=True)
    stacks = stacked(logits, torch.zeros(2, 3).bool())
    loss, _ = total_loss(stacks, {name: {"coefficient": 1.0, **options}}, LossInputs(torch.tensor([0, 1])))
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_collapsed_router_has_a_finite_gradient(name, options):
    logits = torch.tensor([300.0, -300.0, 0.0, 0.0]).expand(1, 2, 3, 4).clone().requires_grad_()
    inputs = LossInputs(torch.tensor([0, 1]))
    loss, _ = total_loss(stacked(logits, None), {name: {"coefficient": 1.0, **options}}, inputs)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


LN4 = math.log(4)
EVEN = torch.zeros(1, 2, 4, 4)
COLLAPSED = torch.tensor([60.0, 0.0, 0.0, 0.0]).expand(1, 2, 4, 4)
BY_TASK = (60.0 * torch.eye(4)[torch.tensor([0, 1])]).reshape(1, 2, 1, 4).expand(1, 2, 4, 4)
"""Each of two sequences sends all its tokens to one expert of its own."""


@pytest.mark.parametrize(
    ("name", "options", "logits", "value"),
    [
        ("load_balancing", {}, EVEN, 1),
        ("load_balancing", {}, COLLAPSED, 4),
        ("load_balancing", {"scope": "batch"}, BY_TASK, 2),
        ("localized_balancing", {"delta": 0.0}, EVEN, 0),
        ("localized_balancing", {"delta": 0.0}, COLLAPSED[:, :1], 4),
        ("mutual_information", {}, EVEN, 0),
        ("mutual_information", {}, COLLAPSED, 0),
        ("mutual_information", {}, BY_TASK, -math.log(2)),
        ("parameter_penalty", {}, COLLAPSED, 2),  # the first expert has half the mean rank
        ("router_entropy", {}, EVEN, LN4),
        ("router_entropy", {}, COLLAPSED, 0),
        ("importance", {}, EVEN, 0),
        ("importance", {}, COLLAPSED, 3),
        ("router_z", {}, EVEN, LN4**2),
    ],
)
def test_value_at_balance_and_at_collapse(name, options, logits, value):
    inputs = LossInputs(torch.arange(logits.shape[1]))
    got, _ = total_loss(stacked(logits, None), {name: {"coefficient": 1.0, **options}}, inputs)
    assert got.item() == pytest.approx(value, abs=1e-5)


def test_linears_that_collapse_onto_different_experts_are_not_called_balanced():
    collapsed = torch.stack([one_hot([[expert] * 8]) for expert in range(4)])
    assert load_balancing(collapsed.float(), collapsed).tolist() == pytest.approx([4, 4, 4, 4])


def test_a_gate_that_underflows_stays_finite_and_keeps_one_expert():
    probabilities = torch.full((1, 3, 4), -200.0).sigmoid()
    selected = top_p(probabilities, 0.8)
    assert selected.any(dim=-1).all()
    assert torch.isfinite(load_balancing(probabilities, selected))


def test_identical_null_experts_need_no_balance_among_themselves():
    probabilities = torch.full((1, 4, 4), 0.25)
    first_null_only = one_hot([[0, 1, 2, 2]])
    assert load_balancing(probabilities, first_null_only, null_experts=2) == pytest.approx(1)
    uneven = torch.tensor([0.2, 0.2, 0.5, 0.1]).expand(1, 4, 4)
    assert load_balancing(uneven, first_null_only) > 1.2
    assert load_balancing(uneven, first_null_only, null_experts=2) == pytest.approx(1)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_with_equal_ranks_the_parameter_penalty_is_load_balancing_per_selected_expert(scope):
    probabilities = torch.randn(2, 6, 4).softmax(-1)
    selected = torch.zeros(2, 6, 4).scatter(-1, probabilities.topk(2).indices, 1.0).bool()
    penalty = parameter_penalty(probabilities, selected, [8, 8, 8, 8], scope=scope)
    torch.testing.assert_close(penalty, 2 * load_balancing(probabilities, selected, scope=scope))


def test_localized_balancing_gives_a_kinds_own_group_less():
    """The direction is the opposite of what the paper's words suggest."""
    logits = torch.zeros(2, 1, 4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        localized_balancing(logits.softmax(-1), torch.tensor([0, 1])).backward()
        optimizer.step()
    first, second = logits.softmax(-1).squeeze(1).tolist()
    assert [sum(first[:2]), sum(second[2:])] == pytest.approx([0.45, 0.45], abs=1e-3)


def test_importance_reaches_only_selected_experts():
    weights = torch.tensor([[[0.7, 0.3, 0.0]]], requires_grad=True)
    selected = weights.detach() > 0
    stack = stack_records(
        [RoutingRecord("a", "x", Routing(weights, weights, selected, weights * selected), TokenMasks())]
    )
    loss, _ = total_loss(stack, {"importance": 1.0})
    gradient = torch.autograd.grad(loss, weights)[0].flatten()
    assert gradient[2] == 0
    assert (gradient[:2] != 0).all()


def test_what_is_counted_carries_no_gradient():
    """With even probabilities fixed, no selection changes the sum of gradients: only probabilities are trained."""
    probabilities = torch.full((1, 4, 4), 0.25, requires_grad=True)
    for loss in (
        load_balancing(probabilities, one_hot([[0, 0, 0, 1]])),
        parameter_penalty(probabilities, one_hot([[0, 0, 0, 1]]), SIZES),
    ):
        gradient = torch.autograd.grad(loss, probabilities)[0]
        assert gradient[..., 0].min() > gradient[..., 2].max()


def test_linears_of_different_width_and_whole_sequence_decisions_add_up():
    narrow, wide = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    pooled = Routing(*(torch.full((2, 1, 4), 0.25),) * 2, torch.ones(2, 1, 4).bool(), torch.ones(2, 1, 4), None, True)
    masks = TokenMasks(torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]))
    records = [
        RoutingRecord("a", "x", recorded(narrow).routing, masks),
        RoutingRecord("b", "x", recorded(wide).routing, masks),
        RoutingRecord("c", "x", pooled, masks),
    ]
    got, _ = total_loss(stack_records(records), {"load_balancing": 1.0})
    each = [total_loss(stack_records([record]), {"load_balancing": 1.0})[0] for record in records]
    torch.testing.assert_close(got, sum(each) / 3)
    assert each[2] == pytest.approx(1)


def test_tokens_that_a_module_flattened_find_their_row_again():
    logits, mask = torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    losses = {"load_balancing": 1.0, "mutual_information": 1.0, "localized_balancing": 1.0}
    inputs = LossInputs(torch.tensor([0, 1]))
    expected, _ = total_loss(stack_records([recorded(logits, mask)]), losses, inputs)
    got, _ = total_loss(stack_records([recorded(logits.flatten(0, 1), mask)]), losses, inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if TASK_IDS in loss_needs(name, {"positives": "task"})])
@pytest.mark.parametrize(("tasks", "words"), [(None, "a task_ids column"), (torch.zeros(5), "2 rows")])
def test_missing_or_misfit_task_ids_are_explained(name, tasks, words):
    setting = {"coefficient": 1.0, **({"positives": "task"} if name == "gate_contrastive" else {})}
    with pytest.raises(MoloraError, match=words):
        total_loss(stacked(EVEN, None), {name: setting}, LossInputs(tasks))


@pytest.mark.parametrize(
    ("tasks", "groups", "words"), [([0, 2], 2, "0..1"), ([0, -1], 2, "0..1"), ([0, 1], 3, "3 equal groups")]
)
def test_kinds_without_a_group_of_experts_are_explained(tasks, groups, words):
    with pytest.raises(MoloraError, match=words):
        localized_balancing(EVEN[0], torch.tensor(tasks), groups=groups)


@pytest.mark.parametrize(
    ("name", "option", "value", "words"),
    [
        ("load_balancing", "scop", "batch", "Did you mean 'scope'"),
        ("parameter_penalty", "scope", "global", "'sequence', 'batch'"),
        ("load_balancing", "scope", ["batch"], "'sequence', 'batch', 'global'"),
        ("localized_balancing", "delta", 1.5, "from 0 to 1"),
        ("localized_balancing", "delta", "0.1", "a number"),
        ("localized_balancing", "delta", float("nan"), "a number"),
        ("localized_balancing", "delta", True, "a number"),
        ("localized_balancing", "groups", 2.0, "an integer of at least 1"),
        ("router_z", "layer_reduction", "max", "'mean', 'sum'"),
    ],
)
def test_impossible_options_are_explained(name, option, value, words):
    assert words in option_problem(name, option, value)


def test_possible_options_have_no_problem_and_defaults_are_those_of_the_functions():
    assert option_problem("localized_balancing", "delta", 1) is None
    assert option_problem("router_entropy", "layer_reduction", "sum") is None
    for name, loss in LOSSES.items():
        parameters = inspect.signature(getattr(losses_module, name)).parameters
        for option, kind in loss.options.items():
            if not isinstance(kind, Number | Choice):
                continue  # steers the coefficient
            default = kind.default if isinstance(kind, Number) else kind.allowed[0]
            assert option_problem(name, option, default) is None
            given = parameters[option].default if option in parameters else inspect.Parameter.empty
            assert given in (default, inspect.Parameter.empty), option
