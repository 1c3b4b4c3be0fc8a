"""`molora compare`: adapters side by side, and which differences are more than chance."""

from __future__ import annotations

import json
import math

import pytest
import tiny
from peft import get_peft_model

import molora_cli
from molora import MoLoraConfig
from molora.commands.compare import Difference, Side, difference
from molora.errors import MoloraError
from molora.reports.data import Score
from molora.runfile.run import TRAINED_WITH, check_versions

KEY = ("sums", "accuracy")


def scored(after, error, **known):
    """One column, with one score."""
    return Side("a", {}, {KEY: Score(*KEY, 50, None, after, (None, error))}, **known)


@pytest.mark.parametrize(
    ("first", "other", "value", "error", "clear"),
    [
        ((0.5, 0.03), (0.7, 0.04), 0.2, 0.05, True),
        ((0.5, 0.03), (0.55, 0.04), 0.05, 0.05, False),
        ((0.5, 0.03), (0.3, 0.04), -0.2, 0.05, True),
        ((0.5, 0.0), (0.6, 0.05), 0.1, 0.05, False),
        ((0.5, None), (0.9, 0.04), 0.4, None, False),
    ],
)
def test_a_difference_is_clear_beyond_two_standard_errors(first, other, value, error, clear):
    found = difference(scored(*first), scored(*other), KEY)
    assert math.isclose(found.value, value)
    assert found.error == (None if error is None else pytest.approx(error))
    assert found.is_clear is clear


@pytest.mark.parametrize(
    ("digests", "error", "paired"),
    [(("x", "x"), 0.2, True), (("x", "y"), 0.05, False), ((None, None), 0.05, False)],
    ids=["the same rows", "other rows", "unknown rows"],
)
def test_a_difference_is_paired_where_the_rows_are_the_same(digests, error, paired):
    pulled = [[0.05, -0.05], [-0.05, 0.05]]
    sides = [
        scored(value, spread, pulls={KEY: pulls}, digests={"sums": digest} if digest else {})
        for value, spread, pulls, digest in zip((0.5, 0.7), (0.03, 0.04), pulled, digests, strict=True)
    ]
    found = difference(*sides, KEY)
    # Rows that move 0.1 each against each other: sqrt((0.1² + 0.1²) * 2 / 1).
    assert found.rows == 50
    assert (found.error, found.paired) == (pytest.approx(error), paired)


@pytest.mark.parametrize(
    ("value", "error", "rows", "clear"),
    [(1.0, 0.0, 2, False), (1.0, 0.0, 10, True), (1e-6, 5e-8, 50, False), (0.3, 0.1, 9, False), (0.3, 0.1, 10, True)],
    ids=["two rows that agree", "ten that do", "rounding", "nine rows", "ten rows"],
)
def test_few_rows_and_rounding_mark_nothing(value, error, rows, clear):
    assert Difference(value, error, True, rows).is_clear is clear


NONE = Side("b", {}, {})


@pytest.mark.parametrize(
    "pair", [(NONE, scored(0.5, 0.1)), (scored(0.5, 0.1), NONE), (scored(None, None), scored(1, 0))]
)
def test_what_was_not_scored_has_no_difference(pair):
    assert difference(*pair, KEY) is None


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three adapters: two with scores, one without."""
    monkeypatch.chdir(tmp_path)
    for name, experts, accuracy in (("a", 4, 0.4), ("b", 8, 0.9), ("bare", 2, None)):
        config = MoLoraConfig.from_preset("mole", num_experts=experts, r=2, target_modules=["q_proj"])
        get_peft_model(tiny.tiny_llama(), config).save_pretrained(name)
        if accuracy is not None:
            after = [{"task": "sums", "metric": "accuracy", "value": accuracy, "count": 50}]
            (tmp_path / name / "molora_report.json").write_text(
                json.dumps({"tasks": ["sums"], "before": [], "after": after, "routing": []})
            )
            state = {"log_history": [{"loss": 2.5, "step": 1}, {"loss": 1.25, "step": 2}, {"train_loss": 9.0}]}
            (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def test_runs_stand_side_by_side(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert molora_cli.main(["compare", "a", "b", "bare", "--output", "out.json"]) == 0
    printed = capsys.readouterr().out
    for said in ("4 of rank 2", "8 of rank 2", "1.2500", "0.400 ± 0.070", "0.900 ± 0.043  +0.500*", "–"):
        assert said in printed
    written = json.loads((runs / "out.json").read_text())
    assert [one["name"] for one in written] == ["a", "b", "bare"]
    assert written[1]["scores"][0]["after"] == 0.9
    assert "difference" in written[1]["scores"][0]
    assert "difference" not in written[0]["scores"][0]
    assert written[2]["scores"] == []


def test_without_scores_it_says_how_to_get_them(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert molora_cli.main(["compare", "bare", "bare"]) == 0
    assert "eval_path" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "give two folders or more"),
        (["a", "nowhere"], "nowhere is no folder"),
        (["a", "b", "--output", "a"], "nothing is overwritten"),
    ],
)
def test_what_cannot_be_compared_is_said(words, said, runs, capsys):
    assert molora_cli.main(["compare", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_runs_are_not_trained_with_a_transformers_that_only_serves():
    check_versions()
    check_versions(f"{TRAINED_WITH}.0")
    with pytest.raises(MoloraError, match=r"5\.19\.0 is installed here.*environment without vLLM"):
        check_versions("5.19.0")
