"""Read adapter folders, and say plainly what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor

from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def read_adapter_config(directory: str) -> MoLoraConfig:
    """Read the config of a molora adapter folder.

    Raises:
        ConfigError: If the folder is missing or holds no usable molora adapter.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise _unusable(directory, "is no folder; give the output_dir of `molora train`.")
    if not (folder / CONFIG_FILE).is_file():
        raise _unusable(directory, f"holds no adapter (no {CONFIG_FILE}); give the output_dir of `molora train`.")
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unusable(directory, f"has a {CONFIG_FILE} that cannot be read ({error}).") from error
    if kind != "MOLORA":
        raise _unusable(directory, f"holds an adapter of type {kind}, not MOLORA.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise _unusable(directory, f"has no {WEIGHTS_FILE}, so its training was not finished.")
    try:
        config = PeftConfig.from_pretrained(directory)
    except ConfigError as error:
        message = "; ".join(f"{problem.field}: {problem.message}" for problem in error.problems)
        raise _unusable(directory, f"has a {CONFIG_FILE} this molora cannot use: {message}") from error
    assert isinstance(config, MoLoraConfig)
    return config


def read_adapter_tensors(directory: str) -> dict[str, Tensor]:
    """Read the tensors of an adapter folder by their names.

    Raises:
        ConfigError: If the file is damaged.
    """
    path = Path(directory) / WEIGHTS_FILE
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping, only keys()
    except (SafetensorError, OSError) as error:
        raise _unusable(directory, f"has a damaged {WEIGHTS_FILE} ({error}).") from error


def _unusable(directory: str, message: str) -> ConfigError:
    return ConfigError([Problem("", f"{directory or '(empty name)'} {message}")], "unusable adapter")
