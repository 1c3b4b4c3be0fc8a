"""Load what a folder holds: an adapter on its base model, or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.base import ensure_pad_token, load_base
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.folders import CONFIG_FILE, unusable
from molora.quantization import RUN_FILE, Quantization
from molora.runfile import RunFile, load_run_file


def read_any_config(directory: str) -> PeftConfig | None:
    """Read the config of an adapter of any kind, before anything is loaded.

    Returns:
        Molora's or PEFT's config; `None` if the folder holds a model and no adapter.

    Raises:
        ConfigError: If the folder holds neither, or a damaged adapter.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise unusable(directory, "is no folder; give that of an adapter or a model.")
    if not (folder / CONFIG_FILE).is_file():
        if (folder / "config.json").is_file():
            return None
        raise unusable(directory, f"holds neither an adapter ({CONFIG_FILE}) nor a model (config.json).")
    try:
        config = PeftConfig.from_pretrained(directory)
    except (ValueError, KeyError, TypeError):
        return read_adapter_config(directory)  # which says what is wrong
    if isinstance(config, MoLoraConfig):
        config = read_adapter_config(directory)
        read_adapter_tensors(directory)  # a damaged file is better found before the base model is loaded
    return config


def read_run(directory: str) -> RunFile | None:
    """The run that made the adapter in a folder, or in a checkpoint of one, if its file can still be read."""
    path = run_file_of(directory)
    try:
        return None if path is None else load_run_file(path)
    except ConfigError:
        return None


def load_adapted(
    directory: str, config: PeftConfig, base_model: str | None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter on its base model, in evaluation mode, with the tokenizer saved beside it if there is one.

    The base model is as in the adapter's run, of its dtype and quantised alike, on the accelerator if there is one.

    Args:
        directory: Folder of the adapter.
        config: Its config.
        base_model: Base model to use instead of the one named in the adapter, in the dtype of its checkpoint.

    Raises:
        ConfigError: If the base model is not known.
        MoloraError: If it cannot be loaded.
    """
    run = None if base_model else read_run(directory)
    base, tokenizer = load_base_of(directory, config, base_model, "auto" if run is None else run.model.dtype)
    model = PeftModel.from_pretrained(base, directory).eval()
    _to_accelerator(model)
    return model, saved_tokenizer(directory, tokenizer, base)


def load_base_of(
    directory: str, config: PeftConfig, base_model: str | None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model of an adapter, quantised as its run had it, and the base model's tokenizer.

    Args:
        directory: Folder of the adapter.
        config: Its config.
        base_model: Base model to use instead of the one named in the adapter.
        dtype: As for `load_base`.

    Raises:
        ConfigError: If the base model is not known.
        MoloraError: If it cannot be loaded.
    """
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ConfigError([Problem("base_model", f"{directory} does not name its base model; pass --base-model.")])
    quantization = None if base_model else Quantization.of_run(directory)
    return load_base(name, dtype=dtype, quantization=quantization)


def saved_tokenizer(directory: str, tokenizer: PreTrainedTokenizerBase, base: Any) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside an adapter, with the chat template it was trained with; the base model's without."""
    if not (Path(directory) / "tokenizer_config.json").exists():
        return tokenizer
    saved: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    ensure_pad_token(saved, base.config.get_text_config().vocab_size)
    return saved


def load_any(directory: str, config: PeftConfig | None, base_model: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an adapter on its base model, or a model, onto the accelerator if there is one.

    Args:
        directory: The folder.
        config: What `read_any_config` found there.
        base_model: Base model to use instead of the one named in the adapter.

    Raises:
        ConfigError: If the base model is not known, or one is given for a folder that is a model itself.
        MoloraError: If something cannot be loaded.
    """
    model: Any
    if config is not None:
        model, tokenizer = load_adapted(directory, config, base_model)
    elif base_model is not None:
        message = f"{directory} holds a model itself, not an adapter; leave it out."
        raise ConfigError([Problem("--base-model", message)], "cannot load the model")
    else:
        model, tokenizer = load_base(directory)
        _to_accelerator(model)
    return model, tokenizer


def _to_accelerator(model: Any) -> None:
    device = torch.accelerator.current_accelerator()
    if device is not None and getattr(model, "quantization_method", None) is None:  # quantised ones are there already
        model.to(device)


def run_file_of(directory: str) -> Path | None:
    """The run file that made the adapter in a folder, or in a checkpoint of one; `None` if it is not there."""
    folder = Path(directory).absolute()
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    return next((place / RUN_FILE for place in places if (place / RUN_FILE).is_file()), None)
