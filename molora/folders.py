"""The files of an adapter folder, and its tensors."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from molora.errors import ConfigError, Problem

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


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
        raise unusable(directory, f"has a damaged {WEIGHTS_FILE} ({error}).") from error


def unusable(directory: str, message: str) -> ConfigError:
    """The error for a folder that cannot be used."""
    return ConfigError([Problem("", f"{directory or '(empty name)'} {message}")], "unusable adapter")
