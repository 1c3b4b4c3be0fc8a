"""`molora report`: a page from whatever lies in the folder, and what it says when something does not."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import reports

import molora_cli
from molora import ConfigError, DataError
from molora.commands.report import CARD, PAGE, run
from molora.reports.data import Loads, Usage
from molora.reports.job import gather
from molora.reports.rows import Options
from molora.writing import WriteError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, rows of two tasks, and a run that trained on them."""
    folder = tmp_path_factory.mktemp("report")
    reports.write_base(folder / "base")
    reports.write_rows(folder / "rows.jsonl")
    file = reports.write_run_file(folder / "run.yaml", folder / "base", folder / "rows.jsonl", folder / "run")
    assert molora_cli.main(["train", str(file)]) == 0
    return folder


def visible(folder: Path) -> str:
    """The page's text without its script, style and data."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", (folder / PAGE).read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("molora.reports.job.load_adapted", lambda *_: pytest.fail("loads the base model"))


def test_a_run_gives_a_page_with_every_section_filled(root: Path, tmp_path: Path, capsys: Any) -> None:
    before = sorted(path.name for path in (root / "run").iterdir())
    assert molora_cli.main(["report", str(root / "run"), str(tmp_path / "out"), "--rows", "2"]) == 0
    assert "open report.html" in capsys.readouterr().out
    text = visible(tmp_path / "out")
    assert 'class="missing"' not in (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    for expected in (
        "adamole",
        "4 of rank 2",
        "maths",
        "exact match",
        "step 4",
        "threshold nets",
        "4 held-out rows of 2 tasks",
    ):
        assert expected in text
    assert "y = W₀x + Σₑ wₑ(x)" in text
    card = (tmp_path / "out" / CARD).read_text(encoding="utf-8")
    assert "| maths | exact match | 5 |" in card
    assert str(root) not in card
    assert sorted(path.name for path in (root / "run").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_pages_numbers_are_is_what_the_training_kept(root: Path) -> None:
    report = gather(str(root / "run"), Options(rows=3))
    assert isinstance(report.loads, Loads)
    assert isinstance(report.usage, Usage)
    assert isinstance(report.curves, list)
    state = json.loads((root / "run" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["molora"]["history"]["molora/"]
    place = kept["layers"].index("base_model.model.model.layers.1.mlp.up_proj")
    own = report.loads.modules.index("model.layers.1.mlp.up_proj")
    assert report.loads.steps == [entry["step"] for entry in kept["entries"]]
    assert [step[own] for step in report.loads.over_time] == [entry["load"][place] for entry in kept["entries"]]
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in report.loads.end)
    assert sum(report.usage.experts) == pytest.approx(1, abs=1e-3)
    loss = next(curve for curve in report.curves if curve.title == "loss")
    assert loss.series["train"] == [(one["step"], one["loss"]) for one in state["log_history"] if "loss" in one]


@pytest.mark.parametrize("name", ["checkpoint-2", "unfinished"])
def test_a_checkpoint_is_reported_without_the_scores_of_the_end(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_base_model(monkeypatch)
    folder = root / "run" / "checkpoint-2"
    if name == "unfinished":
        folder = tmp_path / "run"
        for step in (2, 4):
            shutil.copytree(root / "run" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        (folder / "checkpoint-4" / "trainer_state.json").write_text("{")
    report = gather(str(folder), Options(routing=False))
    assert report.title.endswith("run, checkpoint-2")
    assert report.about["state"] == "a checkpoint of a training"
    assert not isinstance(report.loads, str)
    assert report.loads.steps[-1] == 2
    if name == "checkpoint-2":
        assert isinstance(report.scores, list)
        assert all(score.after is None and score.before is not None for score in report.scores)
        assert report.run_file[1]


def test_without_routing_no_base_model_is_needed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_base_model(monkeypatch)
    assert run(str(root / "run"), str(tmp_path / "out"), routing=False) == 0
    text = visible(tmp_path / "out")
    assert text.count("Left out by --no-routing") == 3
    assert "the training's last steps, up to step 4" in text


def test_without_matplotlib_there_are_no_pictures_and_it_says_how_to_get_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("molora.commands.report.available", lambda: False)
    monkeypatch.setattr("molora.commands.report.draw", lambda *_: pytest.fail("draws"))
    assert run(str(root / "run"), str(tmp_path / "out"), routing=False) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [PAGE, CARD]
    for text in (capsys.readouterr().out, (tmp_path / "out" / CARD).read_text(encoding="utf-8")):
        assert 'pip install "molora[report]"' in text


def test_an_adapter_alone_says_how_to_get_the_rest(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_base_model(monkeypatch)
    folder = reports.write_adapter(tmp_path / "alone", root / "base", num_experts=4)
    assert run(str(folder), str(tmp_path / "out")) == 0
    text = visible(tmp_path / "out")
    for advice in ("--data FILE", "trainer_state.json", "eval_path", "No run file lies beside the adapter"):
        assert advice in text
    assert "Duplicate experts" in text


def test_damaged_files_beside_the_adapter_are_named_and_left_out(root: Path, tmp_path: Path) -> None:
    folder = reports.write_adapter(tmp_path / "adapter", root / "base", num_experts=4)
    (folder / "trainer_state.json").write_text('{"log_history": [')
    (folder / "molora_report.json").write_text("[1]")
    report = gather(str(folder), Options(routing=False))
    assert report.notes == [
        "molora_report.json is damaged and left out.",
        "trainer_state.json is damaged and left out.",
    ]
    assert isinstance(report.scores, str)
    assert isinstance(report.curves, str)


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "null experts": ("adamoe", {}, "that do nothing"),
    "a block's experts": ("mixlora", {"num_experts": 4}, "experts, A"),
    "experts that grow with depth": ("mola", {}, "2, 4 with depth"),
    "shared experts": ("loramoe", {}, "experts, A"),
    "a shared A": ("hydralora", {}, "experts, A"),
    "pools": ("mos", {}, "no pair of matrices"),
    "one decision a sequence": ("phatgoose", {}, "prototype"),
    "several routers a token": ("polytropon-mhr", {}, "maths"),
    "merged before use": ("smear", {}, "experts, A"),
    "nothing routed": ("lora", {}, "experts, A"),
}
FIXED = ("pools", "nothing routed")
"""Those whose experts always weigh the same."""


@pytest.mark.parametrize("case", KINDS)
def test_every_kind_of_adapter_gets_its_page(case: str, root: Path, tmp_path: Path) -> None:
    preset, fields, expected = KINDS[case]
    tasks = ("maths", "words", "third")
    folder = reports.write_adapter(tmp_path / "adapter", root / "base", preset, tasks, **fields)
    rows = [str(root / "rows.jsonl")]
    assert run(str(folder), str(tmp_path / "out"), data=rows, rows=2, base_model=str(root / "base")) == 0
    assert expected in visible(tmp_path / "out")
    assert "NaN" not in (tmp_path / "out" / PAGE).read_text(encoding="utf-8")
    shown = "This adapter routes nothing" if case in FIXED else "4 held-out rows of 2 tasks (rows.jsonl)"
    assert shown in visible(tmp_path / "out")


def test_a_text_is_shown_token_by_token(root: Path) -> None:
    report = gather(str(root / "run"), Options(text="Tell me\nwhy", rows=1))
    assert not isinstance(report.tokens, str)
    assert report.tokens.origin == "the text that was given"
    assert "".join(report.tokens.pieces) == "Tell me\nwhy"
    assert report.tokens.groups == ["all linears", "layer 0", "layer 1"]
    assert [len(own) for own in report.tokens.weights] == [11, 11, 11]
    assert all(sum(row) == pytest.approx(1, abs=0.01) for own in report.tokens.weights for row in own)


def test_of_a_long_text_the_beginning_is_shown_and_the_rest_is_counted(root: Path) -> None:
    tokens = gather(str(root / "run"), Options(text="ab" * 150, rows=1)).tokens
    assert not isinstance(tokens, str)
    assert (len(tokens.pieces), len(tokens.weights[0]), tokens.left_out) == (240, 240, 60)


SCORED = {"num_experts": 3, "r": 2, "score_weight": 1.0}


@pytest.mark.parametrize(
    ("preset", "fields", "options", "messages"),
    [
        ("molora", {}, {"routing": False, "text": "x", "rows": 2}, ["--text", "--rows", "--no-routing leaves out"]),
        ("molora", {}, {"routing": False, "data": ["x"], "base_model": "y"}, ["--data", "--base-model"]),
        ("molora", {}, {"rows": 0}, ["--rows: got 0; must be at least 1"]),
        ("molora", {}, {"text": "  "}, ["--text: got an empty text"]),
        ("polytropon", {}, {"text": "x"}, ["--text", "the task of a row"]),
        ("molora", SCORED, {"text": "x"}, ["--text", "scores of its experts"]),
        ("molora", SCORED, {"data": ["rows.jsonl"]}, ["--data", "rows.jsonl", "has no `expert_scores`"]),
        ("polytropon", {}, {"data": ["rows.jsonl"]}, ["--data", "words was none in training; these are maths"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_and_nothing_is_written(
    preset: str,
    fields: dict[str, Any],
    options: dict[str, Any],
    messages: list[str],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_base_model(monkeypatch)
    monkeypatch.chdir(root)
    folder = reports.write_adapter(tmp_path / "adapter", root / "base", preset, ("maths",), **fields)
    with pytest.raises(ConfigError) as error:
        run(str(folder), str(tmp_path / "out"), **options)
    assert all(message in str(error.value) for message in messages)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{root}/nowhere", "{out}"], "is no folder"),
        (["{root}/base", "{out}"], "holds no adapter"),
        (["{root}/run", "{out}", "--data", "{root}/nowhere.jsonl"], "nowhere.jsonl"),
        (["{root}/run", "{out}", "--base-model", "{root}/nowhere"], "add --no-routing"),
        (["{root}/run", "{root}/run", "--no-routing"], "nothing is overwritten"),
        (["{root}/run", "{out}", "--rows", "none"], "must be a whole number"),
        (["{root}/run"], "OUT"),
    ],
)
def test_the_command_line_says_what_is_wrong_and_returns_2(
    words: list[str], message: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(root=root, out=tmp_path / "out") for word in words]
    assert molora_cli.main(["report", *given]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_what_fails_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        run(str(root / "run"), str(tmp_path / "full"), routing=False)
    with pytest.raises(DataError):
        run(str(root / "run"), str(tmp_path / "out"), data=[str(tmp_path / "nowhere.jsonl")])
    monkeypatch.setattr("molora.commands.report.markdown", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(str(root / "run"), str(tmp_path / "out"), routing=False)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
