"""What is imported can be used by the commands: generated from and evaluated, in the dtype it was trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from loras import save_lora
from peft import PeftModel, get_peft_model

from molora import MoLoraConfig, loaded
from molora.commands import generate
from molora.data import Example, TaskData
from molora.evaluation import score_tasks
from molora.heads import generation_needs
from molora.loaded import load_any, read_any_config, read_run
from molora.quantization import RUN_FILE

OF_BASE = {"router_input": "base", "router_level": "token", "selection": "dense"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.tiny_llama().save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def routed(**fields: Any) -> PeftModel:
    torch.manual_seed(3)
    options = {"num_experts": 3, "r": 4, "lora_alpha": 64, "target_modules": "all-linear", "init_weights": False}
    return get_peft_model(tiny.tiny_llama(), MoLoraConfig(task_type="CAUSAL_LM", **options | fields)).eval()


def saved(folder: Path, base: Path, **fields: Any) -> Path:
    model = routed(**fields)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        (OF_BASE, {"use_cache": False}),
        (OF_BASE | {"router_level": "sequence"}, {}),
        (OF_BASE | {"router_input": "module"}, {}),
        ({}, {}),
    ],
)
def test_only_a_router_of_the_base_per_token_needs_to_do_without_a_cache(fields: Any, needs: Any) -> None:
    assert generation_needs(routed(**fields)) == needs
    assert generation_needs(tiny.tiny_llama()) == {}


def test_answers_of_a_router_of_the_base_per_token(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "adapter", base, **OF_BASE)
    generate.run(str(folder), ["hello"], max_new_tokens=5, temperature=0.0, base_model=None)
    printed = capsys.readouterr().out.strip()
    tokenizer = tiny.tiny_tokenizer()
    model = PeftModel.from_pretrained(tiny.tiny_llama(), str(folder)).eval()
    chat = [{"role": "user", "content": "hello"}]
    given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False)
    answer = tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert printed == answer
    example = Example(chat, answer, "t")
    scores = score_tasks(model, tokenizer, [TaskData("t", 1.0, [], [example])], max_new_tokens=5, progress=False)
    assert {score.metric: score.value for score in scores}["exact_match"] == 1.0


@pytest.mark.parametrize("kind", ["adapter", "lora", "base"])
def test_models_go_to_the_accelerator(kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "adapter", base)
    save_lora(tmp_path / "lora", target_modules=["q_proj"])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    folder, given = str(tmp_path / kind), str(base) if kind == "lora" else None
    model, _ = load_any(folder, read_any_config(folder), given)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    if kind != "base":
        model, _ = loaded.load_adapted(folder, read_any_config(folder), given)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("where", ["adapter", "adapter/checkpoint-10"])
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_an_adapter_is_loaded_in_the_dtype_of_its_run(
    where: str, dtype: str, expected: torch.dtype, base: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / where, base)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "a b"}\n')
    run = {"model_name_or_path": str(base), "output_dir": str(tmp_path / "adapter"), "dtype": dtype}
    (tmp_path / "adapter" / RUN_FILE).write_text(yaml.safe_dump(run | {"datasets": [{"path": str(data)}]}))
    assert read_run(str(folder)) is not None
    for given, wanted in ((None, expected), (str(base), torch.float32)):
        model, _ = loaded.load_adapted(str(folder), read_any_config(str(folder)), given)
        assert model.get_base_model().get_input_embeddings().weight.dtype == wanted
