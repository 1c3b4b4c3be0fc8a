"""No loss waits for the device: with values that do not exist, whatever needs one fails."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from molora import losses
from molora.losses.routing_contrastive import token_sums

EXPERTS, COLUMNS = 4, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def decisions(*names):
    """Arguments of a loss of decisions, by name, and the leaf that learns."""

    def make():
        logits = torch.randn(2, 3, 5, EXPERTS, requires_grad=True)
        probabilities = logits.softmax(-1)
        given = {
            "probabilities": probabilities,
            "view": probabilities.flip(1),
            "clean_logits": logits,
            "logits": logits + 0.1,
            "selected": probabilities > 0.2,
            "weights": probabilities,
            "mask": torch.ones(3, 5).bool(),
            "task_ids": torch.zeros(3, dtype=torch.long),
            "counts": torch.ones(2, EXPERTS),
            "tokens": torch.ones(()),
        }
        return {name: given[name] for name in names}, logits

    return make


def outputs():
    up = torch.randn(2, 16, len(COLUMNS), requires_grad=True)
    z, selected = torch.randn(2, 15, len(COLUMNS)), torch.ones(2, 15, EXPERTS) > 0
    mask = torch.ones(15).bool()
    return {
        "z": z,
        "up": up,
        "selected": selected,
        "expert_of_column": torch.arange(8) // 2,
        "mask": mask,
        "max_tokens": 4,
    }, up


def rows(**more):
    def make():
        matrix = torch.randn(2, EXPERTS, 6, requires_grad=True)
        first = "matrix" if "expert_of_row" in more else "rows"
        return {first: matrix, **{name: value() if callable(value) else value for name, value in more.items()}}, matrix

    return make


def contrasted():
    given, matrix = rows()()
    sums, counts = token_sums(torch.randn(15, 6), torch.ones(15, EXPERTS) > 0, torch.ones(15).bool())
    return {**given, "token_sums": sums.expand(2, -1, -1), "counts": counts.expand(2, -1)}, matrix


def passes():
    logits = torch.randn(3, 5, 7, requires_grad=True)
    return {"logits": logits, "other": logits.flip(0), "mask": torch.ones(3, 5).bool(), "max_tokens": 4}, logits


CASES = [
    (partial(losses.load_balancing, scope="sequence"), decisions("probabilities", "selected", "mask")),
    (partial(losses.load_balancing, scope="batch", count="first"), decisions("probabilities", "selected", "mask")),
    (
        partial(losses.load_balancing, scope="global", null_experts=2),
        decisions("probabilities", "selected", "mask", "counts", "tokens"),
    ),
    (losses.mutual_information, decisions("probabilities", "task_ids", "mask")),
    (partial(losses.parameter_penalty, sizes=(1, 2, 3, 4)), decisions("probabilities", "selected", "mask")),
    (losses.router_entropy, decisions("probabilities", "mask")),
    (losses.batch_entropy, decisions("probabilities", "mask")),
    (losses.importance, decisions("weights", "mask")),
    (partial(losses.load, noise=0.1), decisions("clean_logits", "logits", "selected", "mask")),
    (losses.router_z, decisions("logits", "mask")),
    (partial(losses.l1_sparsity, experts_per_token=2), decisions("probabilities", "selected", "mask")),
    (losses.gate_contrastive, decisions("probabilities", "mask", "view")),
    (losses.gate_contrastive, decisions("probabilities", "mask", "task_ids")),
    (losses.routing_contrastive, contrasted),
    (losses.expert_contrastive, outputs),
    (losses.output_orthogonality, outputs),
    (losses.expert_orthogonality, rows(expert_of_row=lambda: torch.arange(EXPERTS), num_experts=EXPERTS)),
    (losses.router_orthogonality, rows()),
    (losses.consistency, passes),
]


@pytest.mark.parametrize(("loss", "make"), CASES)
def test_a_loss_and_its_gradient_need_no_value_on_the_host(loss, make):
    with FakeTensorMode():
        given, leaf = make()
        value = loss(**given)
        gradient = torch.autograd.grad(value.sum(), leaf)[0]
    assert value.shape == (() if loss is losses.consistency else (2,))
    assert gradient.shape == leaf.shape


def test_adapted_coefficients_need_no_value_on_the_host():
    with FakeTensorMode():
        assert losses.adapted_coefficients(torch.ones(2), torch.ones(2, 4), torch.full((2,), 4)).shape == (2,)


def test_the_check_sees_a_value_on_the_host():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool((torch.ones(3) > 0).any())
