"""The figures of the continual studies, by hand, and their tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks.quality import continual_tables


def _run(arm, seed, losses, shares=None, grows=0):
    settings = {"arm": arm, "seed": seed, "tasks": ["a", "b", "c"], "stages": [["a"], ["b"], ["c"]], "grows": grows}
    settings |= {"learning_rate": 0.1}
    return {
        "settings": settings,
        "before": [9.0, 9.0, 9.0],
        "stages": [{"losses": own} for own in losses],
        "shares": shares,
        "parameters": {"all": 1},
    }


LOSSES = [[1.0, None, None], [2.0, 3.0, None], [4.0, 3.5, 6.0]]


def test_forgetting_by_hand():
    used = [[0.5, 0.2, 0.3], [0.1, 0.5, 0.4], [0.0, 0.0, 1.0]]
    found = continual_tables.forgetting(_run("grown", 0, LOSSES, used, grows=1))
    assert found == pytest.approx({"final": 4.5, "learned": 10 / 3, "first": 3.0, "mean": 1.75, "leaked": 0.45})


def test_ratios_are_of_means_and_of_each_seed():
    own = [{"first": 1.0}, {"first": 2.0}]
    whole, each = continual_tables.ratios(own, [{"first": 2.0}, {"first": 8.0}], "first")
    assert whole == pytest.approx(0.3)
    assert each.values == (0.5, 0.25)


@pytest.mark.parametrize(("other", "whole"), [([-1.0, 4.0], 1.0), ([-4.0, 1.0], None)])
def test_there_is_no_ratio_to_what_was_not_forgotten(other, whole):
    own = [{"first": 1.0}, {"first": 2.0}]
    assert continual_tables.ratios(own, [{"first": value} for value in other], "first") == (whole, None)


def test_arms_are_compared_on_the_seeds_that_both_have():
    other = [[1.0, None, None], [2.0, 3.0, None], [2.0, 3.5, 6.0]]
    runs = [_run("lora", 1, LOSSES), _run("lora", 0, LOSSES), _run("grown", 1, other)]
    found = continual_tables.sequence_summary(runs)
    assert found["lora"]["first"].values == (3.0, 3.0)
    assert found["grown"]["first_over_lora"]["of_means"] == pytest.approx(1 / 3)
    assert found["grown"]["final_minus_lora"].values == pytest.approx([-2 / 3])
    assert found["grown"]["matrix"][1] == [2.0, 3.0, None]
    text = continual_tables.TEXTS["sequence"](runs)
    for words in ("| grown | 0.1 | 1 |", "| 0.33 | 0.33 |", "| b | 2.000 | 3.000 | - |", "Seeds 0, 1."):
        assert words in text


def test_a_scarce_task_is_scored_where_it_was_scarce():
    runs = []
    for seed in (0, 1):
        for task in range(2):
            limits = [2 if other == task else 99 for other in range(2)]
            losses = [seed + 1.0 + task if other == task else 50.0 for other in range(2)]
            settings = {"arm": "lora", "seed": seed, "tasks": ["a", "b"], "limits": limits}
            runs.append({"settings": settings, "stages": [{"losses": losses}]})
    found = continual_tables.scarce_summary(runs)["lora"]
    assert [found[name].values for name in ("a", "b", "mean")] == [(1.0, 2.0), (2.0, 3.0), (1.5, 2.5)]
    assert "has 2 rows" in continual_tables.scarce_text(runs)
