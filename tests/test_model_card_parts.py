"""The parts of a card: what counts as an id or a path, front matter, results, and the name of a method."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cards import TARGETS
from methods import SETTINGS, config_of

from molora import MoLoraConfig
from molora.card.front import merged, model_index
from molora.card.method import preset_of
from molora.presets import available_presets
from molora.reports.data import Score
from molora.shown import hub_id, is_path, last_part, without_paths

NAMES = {
    "an id": ("org/model", "org/model", "org/model"),
    "an old id": ("gpt2", "gpt2", "gpt2"),
    "a folder": ("/data/models/mine", None, "mine"),
    "a folder at home": ("~/mine", None, "mine"),
    "a folder here": ("./mine", None, "mine"),
    "a folder of Windows": ("C:\\models\\mine", None, "mine"),
    "deep": ("a/b/c", None, "a/b/c"),
    "the hub's cache": ("/x/hub/models--org--model-1/snapshots/0a1b/", "org/model-1", "0a1b"),
    "packaged, converted": ("/x/smollm2-135m-instruct-v1", None, "smollm2-135m-instruct"),
    "packaged": ("smollm2-135m-instruct", None, "smollm2-135m-instruct"),
    "nothing": ("", None, ""),
}


@pytest.mark.parametrize("case", NAMES)
def test_only_ids_of_the_hub_count_as_such(case):
    name, known, shown = NAMES[case]
    assert hub_id(name) == known
    assert last_part(name) == shown
    assert is_path(name) == (shown != name)


def test_a_folder_that_looks_like_an_id_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub_id("org/model") is None


PLACES = {
    "a folder in a sentence": ("see /home/me/secret-project", "see secret-project"),
    "two": ("/a/b and then, /c/d/e.", "b and then, e."),
    "at home": ("in ~/work/x and ~me/y", "in x and y"),
    "of Windows": (r"C:\Users\me\x, or D:/data/y", "x, or y"),
    "a share of Windows": (r"on \\server\share\x", "on x"),
    "behind a sign": ("--data=/home/me/x.jsonl 'at:/home/me/y'", "--data=x.jsonl 'at:y'"),
    "a list": ("PATH=/usr/bin:/home/me/bin", "PATH=bin:bin"),
    "a file's address": ("file:///home/me/x y", "x y"),
    "with a slash at its end": ("from /home/me/x/", "from x"),
    "an address": ("https://example.org/a/b", "https://example.org/a/b"),
    "an id": ("org/model and a/b/c", "org/model and a/b/c"),
    "no path": ("1/2, and/or, a / b, </s>, /think, ~ 5", "1/2, and/or, a / b, </s>, /think, ~ 5"),
    "a pattern": (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
}


@pytest.mark.parametrize("case", PLACES)
def test_of_paths_within_a_text_the_last_part_stays(case):
    text, expected = PLACES[case]
    assert without_paths(text) == expected


def test_front_matter_of_the_author_stays_and_paths_go():
    old = {"tags": ["mine", "base_model:adapter:/x/y"], "base_model": "/x/y", "language": "de", "datasets": "own/rows"}
    front = merged(old, {"library_name": "peft", "license": None, "datasets": ["org/rows"]}, ["molora"], None)
    assert front == {
        **{"library_name": "peft", "tags": ["mine", "molora"], "language": "de"},
        "datasets": ["own/rows", "org/rows"],
    }


def test_results_of_others_stay_beside_ours():
    score = Score("maths", "accuracy", 50, 0.4, 0.8, (0.07, 0.057))
    first = model_index(None, "tiny", [score], {}, "text-generation")
    own = {"type": "bleu", "value": 0.5}
    first[0]["results"].append({"task": {"type": "x"}, "dataset": {"name": "d", "type": "d"}, "metrics": [own]})
    again = [Score("maths", "accuracy", 60, 0.4, 0.9)]
    second = model_index(first, "other", again, {"maths": "org/m"}, "text-generation")
    assert second[0]["name"] == "tiny"
    metrics = [metric for result in second[0]["results"] for metric in result["metrics"]]
    assert [metric["value"] for metric in metrics] == [0.5, 0.9]
    assert metrics[1]["args"] == {"rows": 60, "without_adapter": 0.4}
    assert first[0]["results"][0]["metrics"][0]["args"]["stderr"] == 0.057
    (bound,) = model_index(None, "tiny", [replace(score, bound=True)], {}, "text-generation")
    assert bound["results"][0]["metrics"][0]["args"]["stderr_at_most"] == 0.057
    assert second[0]["results"][1]["dataset"] == {"name": "maths", "type": "org/m"}
    assert model_index(None, "tiny", [], {}, "text-generation") is None


@pytest.mark.parametrize("preset", available_presets())
def test_a_method_is_told_by_its_choices_or_not_at_all(preset):
    # Two that differ in where the experts come from cannot be told apart without them.
    found = preset_of(config_of(preset))
    assert found == preset or (found, preset) == ("mole", "lora-bank")
    assert preset in SETTINGS


def test_choices_of_ones_own_are_no_method():
    assert preset_of(MoLoraConfig(target_modules=TARGETS, gate="sigmoid", selection="top_p")) is None
