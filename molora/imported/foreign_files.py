"""Files that others wrote: read as data, never run, and never from outside the folder that was given."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from molora.base import resolve_base
from molora.errors import ConfigError, MoloraError, Problem
from molora.folders import WEIGHTS_FILE

PICKLE_FILE = "adapter_model.bin"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

_LOAD_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    MemoryError,
)
"""What a damaged or hostile file makes `torch.load` raise; every one of them means the same to a user."""


@dataclass(frozen=True)
class Converted:
    """A foreign checkpoint in molora's terms.

    Attributes:
        preset: The preset that computes the same.
        fields: Fields of the config that differ from it.
        tensors: The tensors of the new adapter, by their names in its file.
        notes: What a user should know, a sentence each.
    """

    preset: str
    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def unusable(problems: Sequence[Problem]) -> ConfigError:
    """The error for a folder that cannot be imported."""
    return ConfigError(problems, "cannot be imported exactly")


def read_foreign_tensors(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder: safetensors, in one file or several, else torch's own format.

    Args:
        folder: The adapter's folder.

    Raises:
        ConfigError: If there is no such file, it is damaged, holds anything but tensors, or asks for a file elsewhere.
    """
    tensors: dict[str, Tensor] = {}
    if (folder / WEIGHTS_FILE).is_file():
        tensors = _safetensors(folder, WEIGHTS_FILE)
    elif (folder / INDEX_FILE).is_file():
        for name in _shards(folder):
            tensors |= _safetensors(folder, name)
    elif (folder / PICKLE_FILE).is_file():
        tensors = _pickled(folder)
    else:
        message = (
            f"has neither {WEIGHTS_FILE} nor {PICKLE_FILE}; give the whole folder, downloaded if it is on the hub."
        )
        raise unusable([Problem("", message, str(folder))])
    odd = [key for key, value in tensors.items() if not value.is_floating_point() or value.layout != torch.strided]
    if odd:
        message = f"is no plain tensor of floating-point numbers, nor are {len(odd) - 1} more."
        raise unusable([Problem(odd[0], message, str(folder))])
    return tensors


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that tensors need in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def base_skeleton(name: str) -> nn.Module:
    """Build a base model without weights, which tells names, sizes, order and activation of its linears.

    Only its config is read. Code that comes with a model is not run.

    Args:
        name: Folder or hub id of the base model.

    Raises:
        MoloraError: If there is no such model, or transformers does not know its kind.
    """
    try:
        config = AutoConfig.from_pretrained(resolve_base(name), trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except MoloraError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoloraError(f"the config of the base model {name!r} cannot be read: {line}") from error
    return model


def _safetensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(folder / name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping, only keys()
    except (SafetensorError, OSError, ValueError) as error:
        message = f"is damaged ({error}); download it again."
        raise unusable([Problem(name, message, str(folder))]) from error


def _shards(folder: Path) -> list[str]:
    """Names of the files an index lists."""
    where = str(folder)
    try:
        listed: Any = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in listed})
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise unusable([Problem(INDEX_FILE, f"cannot be read ({error!r}).", where)]) from error
    problems = []
    for name in names:
        if name in (".", "..") or "/" in name or "\\" in name or Path(name).name != name:
            message = f"asks for {name!r}; only files of the folder itself are read. Do not use this checkpoint."
            problems.append(Problem(INDEX_FILE, message, where))
        elif not (folder / name).is_file():
            problems.append(Problem(INDEX_FILE, f"lists {name!r}, which is missing; download it again.", where))
    if problems:
        raise unusable(problems)
    return names


def _pickled(folder: Path) -> dict[str, Tensor]:
    """Read what `torch.save` wrote, with the reader that knows tensors and containers and calls nothing else."""
    where = str(folder)
    try:
        content = torch.load(folder / PICKLE_FILE, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS as error:
        # torch's own text goes on to explain how to load the file unsafely.
        message = (
            "is damaged, or holds more than tensors, which could run code when it is read; none was run. Get it from "
            "its authors as safetensors."
        )
        raise unusable([Problem(PICKLE_FILE, message, where)]) from error
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        message = f"holds a {type(content).__name__} that is no mapping of names to tensors."
        raise unusable([Problem(PICKLE_FILE, message, where)])
    return {key: value.detach() for key, value in content.items()}
