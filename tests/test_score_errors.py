"""Standard errors of scores: those of textbooks, paired where rows are the same, and kept in files."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from rich.console import Console
from tiny import tiny_llama, tiny_tokenizer

from molora.data import Example, TaskData
from molora.evaluation import Change, TaskScore, score_table, score_tasks, with_error
from molora.evaluation.metrics import likeliest, paired_error, pulls, standard_error
from molora.evaluation.record import as_entries, digest, digests_of, read_rows_file, with_rows, write_rows

DRAWN = np.random.default_rng(0)
LOSSES = [DRAWN.gamma(2.0, 1.0, 40).tolist() for _ in range(2)]
TOKENS = DRAWN.integers(1, 30, 40).tolist()


def rows(*texts: str) -> TaskData:
    return TaskData("t", 1.0, [], [Example("q", text, "t") for text in texts])


def test_the_error_of_a_plain_mean_is_that_of_textbooks() -> None:
    values = DRAWN.normal(size=31).tolist()
    wanted = np.std(values, ddof=1) / math.sqrt(31)
    assert standard_error(pulls(values, [1] * 31)) == pytest.approx(wanted)
    assert TaskScore.of_rows("t", "token_f1", values).stderr == pytest.approx(wanted)


def test_the_error_of_a_perplexity_is_what_resampling_rows_finds() -> None:
    score = TaskScore.of_rows("t", "perplexity", LOSSES[0], TOKENS)
    losses, tokens = np.array(LOSSES[0]), np.array(TOKENS)
    assert score.value == pytest.approx(math.exp((losses * tokens).sum() / tokens.sum()))
    drawn = DRAWN.integers(0, 40, (4000, 40))
    resampled = np.exp((losses * tokens)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    assert score.stderr == pytest.approx(resampled.std(), rel=0.15)


@pytest.mark.parametrize("metric", ["token_f1", "perplexity"])
def test_a_change_is_paired_on_rows(metric: str) -> None:
    weights = TOKENS if metric == "perplexity" else None
    before = TaskScore.of_rows("t", metric, LOSSES[0], weights)
    shifted = TaskScore.of_rows("t", metric, [value - 0.1 for value in LOSSES[0]], weights)
    other = TaskScore.of_rows("t", metric, LOSSES[1], weights)
    same = Change.between(before, shifted)
    # All rows move alike: a mean moves by exactly that. A perplexity is divided by a constant.
    scale = 1 - math.exp(-0.1) if metric == "perplexity" else 0.0
    assert same.stderr == pytest.approx(scale * (before.stderr or 0.0), abs=1e-12)
    assert same.better is (metric == "perplexity")
    assert Change.between(before, other).stderr == pytest.approx(paired_error(other.pulls(), before.pulls()))
    apart = Change.between(before, other, same_rows=False)
    assert apart.stderr == pytest.approx(math.hypot(before.stderr or 0.0, other.stderr or 0.0))


@pytest.mark.parametrize(
    ("totals", "lengths", "index"),
    [
        ([-3.0, -2.0, -4.0], None, 1),
        ([-3.0, -2.0, -4.0], [3, 1, 8], 2),
        ([-2.0, -2.0], None, 0),
        ([-1.0, -9.0], [0, 1], 0),
    ],
    ids=["summed", "by length", "the first of equals", "an empty choice"],
)
def test_the_likeliest_choice(totals: list[float], lengths: list[int] | None, index: int) -> None:
    assert likeliest(totals, lengths) == index


def test_one_row_has_no_error() -> None:
    assert TaskScore.of_rows("t", "accuracy", [1.0]).stderr is None


def test_scores_of_other_numbers_of_rows_are_not_paired() -> None:
    few, many = TaskScore.of_rows("t", "accuracy", [0.0, 1.0]), TaskScore.of_rows("t", "accuracy", [0.0, 1.0, 1.0])
    assert Change.between(few, many).stderr == pytest.approx(math.hypot(few.stderr or 0.0, many.stderr or 0.0))


def test_rows_come_back_from_their_file_and_sums_from_theirs(tmp_path) -> None:
    task = rows("one", "two", "three")
    before = score_tasks(tiny_llama(), tiny_tokenizer(), [task], max_new_tokens=2, progress=False)
    after = score_tasks(
        tiny_llama(tie_word_embeddings=False), tiny_tokenizer(), [task], max_new_tokens=2, progress=False
    )
    write_rows(tmp_path / "molora_rows.json", [task], before=before, after=after)
    entries = json.loads(json.dumps(as_entries(after, before)))
    document = read_rows_file(tmp_path)
    assert document["digests"] == {"t": digest(task)}
    found = with_rows([TaskScore.from_json(entry) for entry in entries], document, "after")
    assert found == after
    for one, was, entry, old in zip(found, after, entries, before, strict=True):
        assert one.rows == pytest.approx(was.rows, abs=1e-6)
        assert one.weights == was.weights
        assert one.stderr == was.stderr
        assert entry["change_stderr"] == Change.between(old, was).stderr


ROWS = '{"digests": [], "after": [{"task": "t", "metric": "accuracy", "rows": %s, "weights": %s}]}'
DAMAGED = {
    "empty": "",
    "a list": "[]",
    "no metric": '{"after": [{"task": "t"}]}',
    "no scores": '{"after": []}',
    "null": '{"after": null}',
    "text in place of a score": '{"after": ["x"]}',
    "text in place of rows": ROWS % ('"ab"', "[1, 1]"),
    "too few rows": ROWS % ("[1]", "[1]"),
    "weights of zero": ROWS % ("[1, 0]", "[0, 0]"),
    "no number": ROWS % ("[1, null]", "[1, 1]"),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_rows_costs_the_pairing_only(text: str, tmp_path) -> None:
    (tmp_path / "molora_rows.json").write_text(text)
    document = read_rows_file(tmp_path)
    assert with_rows([TaskScore("t", "accuracy", 0.5, 2)], document, "after")[0].rows == ()
    assert digests_of(document) == {}


def test_a_perplexity_beyond_all_numbers_is_infinite_and_null_in_json() -> None:
    before, after = (TaskScore.of_rows("t", "perplexity", [loss, 3.0], [1, 1]) for loss in (2.0, 5000.0))
    assert (after.value, after.stderr) == (math.inf, None)
    entry = json.loads(json.dumps(as_entries([after], [before]), allow_nan=False))[0]
    assert (entry["value"], entry["change_stderr"]) == (None, None)
    assert TaskScore.from_json(entry) == after


def test_names_of_tasks_are_no_markup() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table([], [TaskScore("[/x] maths [hard]", "accuracy", 0.5, 2)]))
    assert "[/x] maths [hard]" in console.export_text()


@pytest.mark.parametrize("other", [rows("one", "two"), rows("two", "one", "three"), rows("one", "two", "threes")])
def test_a_digest_tells_other_rows(other: TaskData) -> None:
    assert digest(other) != digest(rows("one", "two", "three"))


def test_the_table_shows_errors_and_without_earlier_scores_one_column() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    before, after = TaskScore.of_rows("t", "accuracy", [0, 0, 1, 0]), TaskScore.of_rows("t", "accuracy", [0, 1, 1, 1])
    console.print(score_table([before], [after]))
    console.print(score_table([], [after]))
    text = console.export_text()
    assert "0.250±0.250" in text
    assert "+0.500±0.289" in text
    assert "value" in text


def test_the_table_fits_into_80_columns_with_numbers_whole() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    weights = [3] * 4
    before = TaskScore.of_rows("slot_extraction", "perplexity", [8.5, 6.7, 7.9, 9.1], weights)
    after = TaskScore.of_rows("slot_extraction", "perplexity", [0.1, 0.2, 0.3, 0.1], weights)
    extra = TaskScore.of_rows("slot_extraction", "accuracy_norm", [0, 1, 0, 1])
    console.print(score_table([before, extra], [after, extra]))
    lines = console.export_text().splitlines()
    assert len([line for line in lines if "slot_extraction" in line]) == 2
    assert any(f"{before.value:.0f}±{before.stderr:.0f}" in line and "perplexity" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.5, 0.0612, "0.500 ± 0.061"),
        (9.9996, None, "10.000"),
        (44.214, 12.691, "44.21 ± 12.69"),
        (120.04, 3.0, "120.0 ± 3.0"),
        (2.0, 4000.0, "2 ± 4000"),
        (-38.899, 3.107, "-38.90 ± 3.11"),
        (math.inf, None, "inf"),
    ],
)
def test_large_numbers_have_fewer_decimals(value: float, error: float | None, text: str) -> None:
    assert with_error(value, error) == text
