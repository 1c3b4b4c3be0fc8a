"""Read adapter folders, and say plainly what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

from peft import PeftConfig

from molora.config import MoLoraConfig
from molora.errors import ConfigError
from molora.folders import CONFIG_FILE, WEIGHTS_FILE, read_adapter_tensors, unusable


def read_adapter_config(directory: str) -> MoLoraConfig:
    """Read the config of a molora adapter folder.

    Raises:
        ConfigError: If the folder is missing or holds no usable molora adapter.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise unusable(directory, "is no folder; give the output_dir of `molora train`.")
    if not (folder / CONFIG_FILE).is_file():
        raise unusable(directory, f"holds no adapter (no {CONFIG_FILE}); give the output_dir of `molora train`.")
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise unusable(directory, f"has an {CONFIG_FILE} that cannot be read ({error}).") from error
    if kind != "MOLORA":
        raise unusable(directory, f"holds an adapter of type {kind}, not MOLORA.")
    if not (folder / WEIGHTS_FILE).is_file():
        raise unusable(directory, f"has no {WEIGHTS_FILE}, so its training was not finished.")
    try:
        config = PeftConfig.from_pretrained(directory)
    except ConfigError as error:
        message = "; ".join(f"{problem.field}: {problem.message}" for problem in error.problems)
        raise unusable(directory, f"has an {CONFIG_FILE} this molora cannot use: {message}") from error
    assert isinstance(config, MoLoraConfig)
    return config


__all__ = ["read_adapter_config", "read_adapter_tensors"]
