"""`molora compose` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from loras import IDS
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

import molora_cli
from molora.compose import compose


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows = [{"prompt": "a b ", "completion": "c d"}, {"prompt": "hi ", "completion": "there"}]
    (folder / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def words(out: Path, base: Path, folders: list[Path], *more: str) -> list[str]:
    adapters = [word for folder in folders for word in ("--adapter", str(folder))]
    return ["compose", str(out), "--base-model", str(base), *adapters, *more]


def test_the_command_writes_a_mixture(
    folders: list[Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    assert molora_cli.main(words(out, base_folder, folders, "--top_k", "2", "temperature=0.5")) == 0
    printed = capsys.readouterr().out
    assert "lora3" in printed
    assert "molora generate" in printed
    model = PeftModel.from_pretrained(tiny_llama(), str(out)).eval()
    assert (model.peft_config["default"].top_k, model.peft_config["default"].temperature) == (2, 0.5)
    expected = compose(tiny_llama(), folders, top_k=2, temperature=0.5).eval()
    assert torch.equal(model(IDS).logits, expected(IDS).logits)
    assert molora_cli.main(words(out, base_folder, folders)) == 2
    assert "already exists" in capsys.readouterr().err


def test_the_command_selects_and_searches_by_examples(
    folders: list[Path], base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixture"
    shots = str(base_folder / "shots.jsonl")
    more = ["--preset", "lorahub", "--shots", shots, "--select", "2", "--expert_layout", "separate"]
    assert molora_cli.main(words(out, base_folder, folders, *more)) == 0
    assert "loss on examples" in capsys.readouterr().out
    assert len(PeftModel.from_pretrained(tiny_llama(), str(out)).peft_config["default"].imported_experts) == 2


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        (["--select", "2"], "give a file with --shots"),
        (["--preset", "lorahub"], "give a file with --shots"),
        (["--shots", "x.jsonl"], "leave it out"),
        (["--select", "9", "--shots", "x.jsonl"], "only 4 adapters"),
        (["--select", "2", "--shots", "none.jsonl"], "no such file"),
        (["--toop_k", "2"], "Did you mean 'top_k'?"),
        (["--top_k", "two"], "must be a whole number"),
        (["--preset", "arow"], "Did you mean 'arrow'?"),
        (["another"], "another"),
        (["--adapter", "nowhere"], "is no folder"),
    ],
)
def test_mistakes_of_the_command(
    folders: list[Path],
    tmp_path: Path,
    more: list[str],
    fragment: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "mixture"
    assert molora_cli.main(words(out, tmp_path, folders, *more)) == 2
    assert fragment in capsys.readouterr().err
    assert not out.exists()


def test_the_base_model_is_the_one_the_adapters_name(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert molora_cli.main(["compose", str(tmp_path / "out"), "--adapter", str(folders[0])]) == 2
    assert "the adapters name none" in capsys.readouterr().err
