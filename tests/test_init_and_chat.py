"""`molora init` and `molora chat`: a file one can run, and a conversation one can watch."""

from __future__ import annotations

import io
import json

import pytest
import tiny
import torch
from peft import get_peft_model

import molora_cli
from molora import MoLoraConfig
from molora.commands.chat import STYLES, by_expert, coloured, style_of
from molora.runfile import load_run_file


def write_rows(path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("preset", ["recommended", "adamole", "lora", "moelora"])
def test_a_started_file_is_a_run_file(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my rows.jsonl")
    write_rows(tmp_path / "sums.train.jsonl")
    words = ["--preset", preset, "--data", "my rows.jsonl", "--data", "sums.train.jsonl"]
    assert molora_cli.main(["init", "support.yaml", *words]) == 0
    assert "molora plan support.yaml" in capsys.readouterr().out
    run = load_run_file("support.yaml")
    assert [dataset.task for dataset in run.datasets] == ["my rows", "sums"]
    assert str(run.output_dir).endswith("runs/support")
    assert run.adapter.target_modules == "all-linear"
    own = MoLoraConfig.from_preset(preset)
    assert f"# num_experts: {own.num_experts} " in (tmp_path / "support.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "recomended"], "Did you mean 'recommended'"),
        (["there.yaml"], "nothing is overwritten"),
    ],
)
def test_what_cannot_be_started_is_said(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.yaml").write_text("mine")
    assert molora_cli.main(["init", *words]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "there.yaml").read_text() == "mine"
    assert not (tmp_path / "run.yaml").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    tiny.tiny_llama().save_pretrained(root / "base")
    tiny.tiny_tokenizer().save_pretrained(root / "base")
    torch.manual_seed(0)
    config = MoLoraConfig.from_preset("mole", num_experts=4, r=2, target_modules=["q_proj"], init_weights=False)
    config.base_model_name_or_path = str(root / "base")
    get_peft_model(tiny.tiny_llama(), config).save_pretrained(root / "adapter")
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps(
            json.loads((root / "adapter" / "adapter_config.json").read_text())
            | {"base_model_name_or_path": str(root / "base")}
        )
    )
    return root / "adapter"


def chat(monkeypatch, adapter, text, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return molora_cli.main(["chat", str(adapter), "--max-new-tokens", "6", *words])


def test_a_conversation_goes_on_is_forgotten_and_ends(monkeypatch, capsys, adapter):
    assert chat(monkeypatch, adapter, "what is red?\n\nand blue?\n/reset\nand blue?\n/quit\nnever read\n") == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert printed[0].startswith("/reset")
    assert len(printed) == 4, "one line of help, and one answer for each question"
    assert chat(monkeypatch, adapter, "and blue?\n") == 0
    alone = [line for line in capsys.readouterr().out.splitlines() if line]
    assert alone[1] == printed[3], "what was said before /reset is not read again"


def test_answers_are_those_of_generate(monkeypatch, capsys, adapter):
    assert chat(monkeypatch, adapter, "what is red?\n") == 0
    told = capsys.readouterr().out.splitlines()[1]
    assert molora_cli.main(["generate", str(adapter), "--prompt", "what is red?", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == told + "\n"


def test_routing_is_shown_below_the_answer(monkeypatch, capsys, adapter):
    assert chat(monkeypatch, adapter, "what is red?\n", "--show-routing") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[-1].count("■") == 4
    shares = [int(word.rstrip("%")) for word in lines[-1].split() if word.endswith("%")]
    assert 98 <= sum(shares) <= 102
    assert shares == sorted(shares, reverse=True)


def test_a_token_has_the_colour_of_the_expert_that_counts_most():
    weights = torch.tensor([[0.1, 0.9], [0.6, 0.4], [0.2, 0.8]])
    text = coloured(["a", "b", "c"], weights)
    assert text.plain == "abc"
    assert [span.style for span in text.spans] == [STYLES[1], STYLES[0], STYLES[1]]
    assert style_of(len(STYLES)) == f"{STYLES[0]} underline"


def test_shares_of_experts_are_means_over_linears():
    torch.manual_seed(0)
    config = MoLoraConfig.from_preset("mola", num_experts=[2, 4], r=2, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(tiny.tiny_llama(), config).eval()
    shares = by_expert(model, torch.randint(0, 50, (7,)), {})
    assert shares.shape == (7, 4)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(7))
    plain = get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset("lora", target_modules=["q_proj"])).eval()
    assert by_expert(plain, torch.randint(0, 50, (7,)), {}) is None
