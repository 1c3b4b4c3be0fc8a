"""Checkpoints that are damaged, hostile or mean something else are refused, and nothing is written or run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import DYNAMIC, LORAMOE, MIXLORA, MOLA, random_tensors, save_moe
from loras import edit_config, save_lora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from molora import ConfigError, MoLoraConfig
from molora.imported.foreign import import_adapter
from molora.writing import WriteError

WEIGHTS = "adapter_model.safetensors"


def refused(folder: Path | list[Path], **options: Any) -> str:
    """The text of the refusal; nothing may be left behind."""
    parent = (folder if isinstance(folder, Path) else folder[0]).parent
    before = sorted(parent.iterdir())
    with pytest.raises(ConfigError) as error:
        import_adapter(folder, parent / "out", **options)
    assert sorted(parent.iterdir()) == before
    return str(error.value)


def moe(folder: Path, config: dict[str, Any] = MIXLORA, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    tensors = random_tensors(tiny_llama(), config)
    if change:
        change(tensors)
    return save_moe(folder, config, tensors)


@pytest.mark.parametrize(
    ("config", "changed", "words"),
    [
        (MIXLORA, {"use_dora": True}, "DoRA"),
        (MIXLORA, {"expert_lora": {"use_dora": True}}, "expert_lora.use_dora"),
        (MIXLORA, {"routing_strategy": "mixlora-switch"}, "skips the block at inference"),
        (MIXLORA, {"routing_strategy": "mixlora-dynamc"}, "Did you mean 'mixlora-dynamic'?"),
        (MIXLORA, {"routing_strategy": ["mixlora"]}, "routing_strategy: got"),
        (DYNAMIC, {"temperature": 0.5}, "divides probabilities"),
        (DYNAMIC, {"top_p": 1.5}, "top_p: got 1.5"),
        (MIXLORA, {"top_k": 5}, "top_k: got 5"),
        (MOLA, {"top_k": 0}, "top_k: got 0"),
        (MIXLORA, {"num_experts": True}, "num_experts: got True"),
        (MIXLORA, {"num_experts": 10**9}, "tensors of at most 4"),
        (MIXLORA, {"r": "3"}, "r: got '3'"),
        (MIXLORA, {"lora_alpha": None}, "lora_alpha: got None"),
        (MIXLORA, {"bias": "all"}, "bias: got 'all'"),
        (MIXLORA, {"jitter_noise": -1}, "jitter_noise: got -1"),
        (MIXLORA, {"target_modules": "q_proj"}, "target_modules: got 'q_proj'"),
        (MIXLORA, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (MIXLORA, {"act_fn": 3}, "act_fn: got 3"),
        (MIXLORA, {"lora_dropout": 1.5}, "lora_dropout: got 1.5"),
        (LORAMOE, {"expert_lora": {"r": 2}}, "read for MIXLORA only"),
        (MIXLORA, {"peft_type": "MIXLORRA"}, "Did you mean 'MIXLORA'?"),
        (MIXLORA, {"peft_type": None}, "allowed are 'LORA', 'MOLORA', 'XLORA'"),
    ],
)
def test_a_config_without_an_exact_equivalent_is_refused(
    config: dict[str, Any], changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = moe(tmp_path / "theirs", config)
    edit_config(folder, **changed)
    assert words in refused(folder)


def test_all_mistakes_of_a_config_are_listed_at_once(tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    edit_config(folder, use_dora=True, top_k=9, bias="all")
    text = refused(folder)
    assert [field in text for field in ("use_dora", "top_k", "bias")] == [True] * 3


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *size: int) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(*size)})


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: [tensors.update({key.replace(old, new): tensors.pop(key)}) for key in list(tensors)]


EXPERT = "mixlora.layers.1.mlp.up_proj.experts.2"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop(f"{EXPERT}.lora_B.weight"), "lacks experts.2.lora_B"),
        (drop("mixlora.layers.0.self_attn.q_proj.lora_A.weight"), "lacks lora_A"),
        (drop("mixlora.layers.1.mlp.moe_gate.weight"), "has no router"),
        (put("mixlora.layers.0.mlp.up_proj.experts.4.lora_A.weight", 3, 32), "has experts.4.lora_A, with 4 experts"),
        (put("mixlora.layers.0.self_attn.q_proj.moe_gate.weight", 4, 32), "which has no experts"),
        (put(f"{EXPERT}.lora_A.weight", 2, 32), "has A [2, 32] and B [64, 3]; rank 3 needs [3, in]"),
        (put(f"{EXPERT}.lora_A.weight", 3), "has A [3]"),
        (put(f"{EXPERT}.lora_B.weight", 60, 3), "maps 32 to 60, but 32 to 64 elsewhere"),
        (put("mixlora.layers.0.mlp.moe_gate.weight", 3, 32), "router of shape [3, 32]; needed is [4, 32]"),
        (put("mixlora.layers.0.mlp.moe_gate.weight", 4, 31), "router of shape [4, 31]; needed is [4, 32]"),
        (
            lambda tensors: tensors.update({f"{EXPERT}.lora_A.weight": torch.zeros(3, 32).int()}),
            "no plain tensor of float",
        ),
        (
            lambda tensors: tensors.update({f"{EXPERT}.lora_A.weight": torch.eye(3).to_sparse()}),
            "no plain tensor of float",
        ),
        (put("classifier", 2, 32), "classification head"),
        (put("something.else", 2), "holds something.else, which are no tensors of mixlora"),
        (put("mixlora.layers.999999.mlp.moe_gate.weight", 4, 32), "lacks layer 2"),
        (rename("layers.0", "layers.2"), "lacks layer 0"),
        (rename("_proj", "_linear"), "known are q_proj"),
        (rename("mixlora", "loramoe"), "no tensors of mixlora"),
        (lambda tensors: tensors.clear(), "num_experts: got 4, but there are tensors of at most 0"),
    ],
)
def test_tensors_that_are_missing_too_much_or_misshaped_are_refused(
    change: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path
) -> None:
    assert words in refused(moe(tmp_path / "theirs", change=change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MIXLORA | {"target_modules": ["q_proj"]}, "num_experts: got 4"),
        (MIXLORA | {"target_modules": ["q_proj"], "num_experts": 1, "top_k": 1}, "holds no experts"),
    ],
)
def test_a_mixture_without_experts_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused(moe(tmp_path / "theirs", config))


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    one = torch.randn(4, 32)
    names = [f"mixlora.layers.{layer}.mlp.moe_gate.weight" for layer in range(2)]
    folder = moe(tmp_path / "theirs", change=lambda tensors: tensors.update(dict.fromkeys(names, one)))
    import_adapter(folder, tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    routers = [
        written[f"base_model.model.model.layers.{layer}.mlp.gate_proj.molora_router.weight"] for layer in range(2)
    ]
    assert torch.equal(routers[0], one)
    assert torch.equal(routers[1], one)


def test_targets_and_tensors_must_agree(tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    edit_config(folder, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    assert "v_proj: has tensors, but target_modules leaves it out" in refused(folder)


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(legacy: bool, tmp_path: Path) -> None:
    folder, trace = moe(tmp_path / "theirs"), tmp_path / "trace"
    content = {**random_tensors(tiny_llama(), MIXLORA), "evil": Evil(f"touch {trace}")}
    path = folder / "adapter_model.bin"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert "could run code when it is read; none was run" in refused(folder)
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert "could run code when it is read; none was run" in refused(folder)
    assert not trace.exists()
    # Without the safe reader it would have: the test itself could fail.
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize(
    "content", [[torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}, {"a": 1}, {"a": {"b": torch.zeros(2)}}]
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    torch.save(content, folder / "adapter_model.bin")
    assert "no mapping of names to tensors" in refused(folder)


def as_safetensors(folder: Path, tensors: dict[str, Any] | None = None) -> Path:
    """The same checkpoint with safetensors."""
    path = folder / "adapter_model.bin"
    save_file(torch.load(path, weights_only=True) if tensors is None else tensors, folder / WEIGHTS)
    path.unlink()
    return folder


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_a_damaged_file_is_refused(damage: str, pickled: bool, tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    path = folder / "adapter_model.bin" if pickled else as_safetensors(folder) / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "header": b"\xff" * 8 + whole[8:], "empty": b""}[damage])
    text = refused(folder)
    assert path.name in text
    assert "is damaged" in text


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    with zipfile.ZipFile(folder / "adapter_model.bin", "w") as archive:
        archive.writestr("../outside", "text")
    assert "is damaged" in refused(folder)
    assert not (tmp_path / "outside").exists()


def test_safetensors_and_shards_mean_the_same_as_the_pickle(tmp_path: Path) -> None:
    import_adapter(moe(tmp_path / "bin"), tmp_path / "a")
    import_adapter(as_safetensors(moe(tmp_path / "safe")), tmp_path / "b")
    sharded = as_safetensors(moe(tmp_path / "sharded"))
    tensors = load_file(sharded / WEIGHTS)
    (sharded / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, sharded / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (sharded / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    import_adapter(sharded, tmp_path / "c")
    written = [(tmp_path / name / WEIGHTS).read_bytes() for name in "abc"]
    assert written[0] == written[1] == written[2]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "{root}/secret.safetensors", "sub/secret.safetensors", ".."]
)
def test_an_index_that_asks_for_a_file_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    folder = as_safetensors(moe(tmp_path / "theirs"))
    tensors = load_file(folder / WEIGHTS)
    (folder / "sub").mkdir()
    (folder / WEIGHTS).unlink()
    for place in (tmp_path, folder / "sub"):
        save_file(tensors, place / "secret.safetensors")
    weight_map = dict.fromkeys(tensors, name.format(root=tmp_path))
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "only files of the folder itself are read" in refused(folder)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', "no json", '{"weight_map": {"a": "gone"}}'])
def test_an_index_that_cannot_be_followed_is_refused(content: str, tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    (folder / "adapter_model.bin").unlink()
    (folder / f"{WEIGHTS}.index.json").write_text(content)
    text = refused(folder)
    assert "cannot be read" in text or "which is missing" in text


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "adapter_model.bin").unlink(), "has neither adapter_model.safetensors nor"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "holds no adapter"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "must hold a JSON object"),
    ],
)
def test_a_folder_without_its_files_is_refused(break_it: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    folder = moe(tmp_path / "theirs")
    break_it(folder)
    assert words in refused(folder)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder, out = moe(tmp_path / "theirs"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        import_adapter(folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("task_type", ["x", "", 5, ["CAUSAL_LM"]])
def test_an_unknown_task_type_is_refused(task_type: Any, tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "lora", target_modules=["q_proj"])
    edit_config(folder, task_type=task_type)
    (folder / WEIGHTS).write_bytes(b"never read")
    assert f"task_type: got {task_type!r}; allowed are 'SEQ_CLS'" in refused(folder)


def test_a_gate_is_not_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "gated"
    preset = MoLoraConfig.from_preset("phatgoose-gate", target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), preset).save_pretrained(folder)
    assert "is a molora adapter with a gate already; use it as it is" in refused(folder)
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if "router" not in name}
    save_file(tensors, folder / WEIGHTS)
    assert "with a gate already" in refused(folder)


def test_options_and_kinds_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    mixture, lora = moe(tmp_path / "mixture"), save_lora(tmp_path / "lora", target_modules=["q_proj"])
    assert "preset: got 'arrow'" in refused(mixture, preset="arrow")
    assert "preset: got 'arrow'" in refused(lora, preset="arrow")
    assert "adapters: are those of an X-LoRA adapter" in refused(lora, adapters={"0": lora})
    assert "several folders must all be plain LoRAs" in refused([lora, mixture])
    assert "is no folder" in refused(tmp_path / "gone")
    with pytest.raises(ConfigError, match="give at least one"):
        import_adapter([], tmp_path / "out")
