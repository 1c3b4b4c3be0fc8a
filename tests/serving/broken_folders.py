"""Folders that a server has to refuse, each made of a good one, and what it has to say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_model import save_llama, save_random
from transformers import AutoTokenizer

from molora import MoLoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROUTER = ".molora_router.weight"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A folder and its fault.

    Attributes:
        name: Of the folder.
        make: Makes it: gets a path where nothing is, the good folder and the base model.
        says: What the refusal has to contain beside the folder's name.
    """

    name: str
    make: Callable[[Path, Path, Path], None]
    says: tuple[str, ...]


def _changed(change: Callable[[Path], None]) -> Callable[[Path, Path, Path], None]:
    def make(out: Path, good: Path, _: Path) -> None:
        shutil.copytree(good, out)
        change(out)

    return make


def _with_tensors(change: Callable[[Tensors, str], None]) -> Callable[[Path, Path, Path], None]:
    """Change the tensors; the function gets the name of one that routes."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(name for name in sorted(tensors) if name.endswith(ROUTER)))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return _changed(apply)


def _with_fields(**fields: Any) -> Callable[[Path, Path, Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | fields))

    return _changed(apply)


def _of_preset(preset: str, **choices: Any) -> Callable[[Path, Path, Path], None]:
    def make(out: Path, _: Path, base: Path) -> None:
        save_random(base, out, MoLoraConfig.from_preset(preset, task_type="CAUSAL_LM", **choices), seed=0)

    return make


def _of_deeper_base(out: Path, _: Path, base: Path) -> None:
    deeper = out.with_name(f"{out.name}-base")
    save_llama(deeper, AutoTokenizer.from_pretrained(base), layers=3)
    config = MoLoraConfig.from_preset("adamole", num_experts=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    save_random(deeper, out, config, seed=0)


def _cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _break_json(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text[: len(text) // 2])


def _cut_rows(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][1:].clone()


def _drop(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _add(tensors: Tensors, name: str) -> None:
    tensors[name.replace(ROUTER, ".molora_router.weight_out")] = torch.ones(3)


def _spoil(tensors: Tensors, name: str) -> None:
    tensors[name][0, 0] = float("nan")


CASES = (
    Case("truncated", _changed(_cut), ("damaged", WEIGHTS)),
    Case("wrong-shape", _with_tensors(_cut_rows), ("does not fit", "molora_router")),
    Case("missing-tensor", _with_tensors(_drop), ("lacks", "molora_router")),
    Case("extra-tensor", _with_tensors(_add), ("not explain", "weight_out")),
    Case("not-a-number", _with_tensors(_spoil), ("not finite",)),
    Case("newer-format", _with_fields(format_version=99), ("format 99",)),
    Case("unknown-field", _with_fields(top_kk=2), ("top_kk",)),
    Case("pickled", _changed(_pickle), (WEIGHTS,)),
    Case("no-json", _changed(_break_json), (CONFIG,)),
    Case(
        "x-lora", _of_preset("x-lora", num_experts=2, target_modules=["q_proj"]), ("cannot be served", "molora export")
    ),
    Case("other-base", _of_deeper_base, ("model.layers.2",)),
    Case("too-wide", _of_preset("adamole", target_modules=["v_proj"]), ("rank 41", "--max-lora-rank 64")),
)
