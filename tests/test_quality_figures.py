"""The quality bench: figures of routing and statistics over rows and seeds, by hand."""

from __future__ import annotations

import math

import pytest
import quality
import torch
from quality import MIXTURE, PLACE, rows_of
from tiny import tiny_llama

from benchmarks.quality import routing, scoring, statistics, tables, training
from molora.routing import affinity

task_folder = quality.task_folder

# Figures of routing


def _sums(selected, weights=None, answers=None) -> affinity.Sums:
    selected = torch.tensor([selected], dtype=torch.float64)
    weights = selected if weights is None else torch.tensor([weights], dtype=torch.float64)
    answers = weights if answers is None else torch.tensor([answers], dtype=torch.float64)
    tokens = weights.sum(dim=-1)
    return affinity.Sums(weights, answers, selected, tokens, tokens * 0.5, tokens * 2.0)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[4.0, 4.0], [4.0, 4.0]], 0.0),
        ([[9.0, 0.0], [0.0, 3.0]], 1.0),
        # H(3/8, 5/8) - (H(1/2) + H(1/4)) / 2
        ([[2.0, 2.0], [1.0, 3.0]], 0.954434 - (1.0 + 0.811278) / 2),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]], 2.0),
    ],
    ids=["alike", "apart", "in between", "four tasks apart"],
)
def test_information_is_that_of_hand_counts(counts, bits):
    assert affinity.mutual_information(torch.tensor(counts)).item() == pytest.approx(bits, abs=1e-5)


def test_load_counts_tasks_equally_however_many_tokens_they_have():
    found = affinity.load(torch.tensor([[90.0, 10.0], [1.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([0.575, 0.425]))


@pytest.mark.parametrize(
    ("loads", "number"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0),
        ([0.97, 0.0, 0.03, 0.0], 2),
        ([0.9, 0.05, 0.025, 0.025], 0),
        ([1.0, 0.024, 0, 0], 3),
    ],
)
def test_an_expert_is_dead_below_a_tenth_of_an_even_share(loads, number):
    assert routing.dead(torch.tensor(loads)).item() == number


def test_figures_of_a_linear_follow_from_its_sums():
    found = routing.figures(
        _sums([[8, 8, 0, 0], [8, 8, 0, 0]], [[6, 2, 0, 0], [2, 6, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]])
    )
    expected = {
        "dead_experts": 2,
        "largest_load": 0.5,
        "dead_by_weight": 2,
        "largest_weight": 0.5,
        "active_experts": 2,
        "gate_entropy": 0.5,
        "router_entropy": 2,
        "information_answers": 1,
        "information": 1 - 0.811278,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-5)
    assert found.keys() == routing.FIGURES.keys()


def test_summary_has_every_linear_and_their_mean():
    found = routing.summary({("a",): _sums([[1, 1], [1, 1]]), ("b",): _sums([[1, 0], [1, 0]])})
    assert (found["a"]["dead_experts"], found["b"]["dead_experts"], found["mean"]["dead_experts"]) == (0, 1, 0.5)


@pytest.mark.parametrize(
    ("rows", "per_sequence", "expected"),
    [((1, 3), False, [[0, 1, 1]]), ((1, 6), False, [[0, 0, 1, 1, 1, 1]]), ((1, 1), True, [[1]])],
    ids=["one a token", "two a token", "one a sequence"],
)
def test_decisions_know_whether_they_are_about_an_answer(rows, per_sequence, expected):
    answers = torch.tensor([[False, True, True]])
    found = affinity.answers_of_decisions(answers, torch.Size(rows), per_sequence)
    assert found.int().tolist() == expected


def test_routing_of_rows_is_what_a_loop_over_recorded_tokens_counts(task_folder):
    from molora import record_routing

    rows = rows_of(task_folder)
    model = training.adapted(tiny_llama(num_hidden_layers=1), MIXTURE, 0).eval()
    found = scoring.routing_of(model, rows.validation, PLACE)
    assert found is not None
    selected = torch.zeros(2, 4)
    answers = torch.zeros(2, 4)
    for task, items in enumerate(rows.validation):
        for item in items:
            with record_routing(model) as records, torch.no_grad():
                model(input_ids=torch.tensor([[*item.prompt, *item.answer]]))
            [own] = [record.routing for record in records if record.layer.endswith("q_proj")]
            selected[task] += own.selected[0].sum(dim=0)
            answers[task] += own.weights[0, len(item.prompt) :].sum(dim=0)
    [name] = [name for name in found if name.endswith("q_proj")]
    share = (selected / selected.sum(dim=1, keepdim=True)).mean(dim=0)
    assert found[name]["largest_load"] == pytest.approx(share.max().item(), abs=1e-4)
    assert found[name]["active_experts"] == 2
    assert found[name]["information_answers"] == pytest.approx(affinity.mutual_information(answers).item(), abs=1e-4)


# Statistics


def _scored(nll: list[float], tokens: list[int]) -> dict[str, list]:
    return {"nll": nll, "tokens": tokens, "exact": [1] * len(nll), "choice": [None] * len(nll)}


def test_differences_are_paired_on_rows_and_tasks_count_equally():
    own = [_scored([1.0, 2.0], [1, 3]), _scored([5.0], [1])]
    other = [_scored([2.0, 4.0], [1, 3]), _scored([4.0], [1])]
    assert statistics.test_loss(own) == pytest.approx((0.75 + 5) / 2)
    assert statistics.difference(own, other) == pytest.approx([-0.75, 1.0])
    # Task 0: rows differ by -1 and -2, of which a mean of -0.75 a token explains -0.75 and -2.25; two rows, one degree
    # of freedom. Task 1: one row tells no error.
    assert statistics.row_error(own, other) == pytest.approx(math.sqrt(0.25**2 * 2 / 16 * 2) / 2)
    with pytest.raises(ValueError, match="paired"):
        statistics.difference(own, [_scored([2.0, 4.0], [1, 2]), other[1]])


def test_the_error_is_over_seeds():
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert found.text() == "2.000 ± 0.577"
    assert statistics.over_seeds([1.0]).text(sign=True) == "+1.000"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-3: [2.0, 3.0], 2e-3: [1.0, 2.0], 4e-3: [9.0, 0.1]}, (2e-3, False)),
        ({1e-3: [1.0], 2e-3: [2.0]}, (1e-3, True)),
        ({1e-3: [1.0]}, (1e-3, False)),
    ],
)
def test_the_learning_rate_with_the_least_mean_loss_is_chosen_and_an_edge_is_said(losses, expected):
    assert statistics.best_rate(losses) == expected


@pytest.mark.parametrize(
    ("seeds", "words"), [(1, ["1 seed ", "no error over seeds"]), (3, ["3 seeds", "50%"]), (9, ["9 seeds", "25%"])]
)
def test_the_note_says_how_well_the_error_is_known(seeds, words):
    found = tables.note([tables.Outcome("lora", seeds={seed: [] for seed in range(seeds)})])
    assert [word for word in words if word not in found] == []
