"""An adapter on the skeleton of its base model, which has shapes and no weights: what a server needs of it."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.config import MoLoraConfig
from molora.errors import MoloraError, did_you_mean
from molora.folders import CONFIG_FILE, unusable
from molora.plain.fixed import layers_of
from molora.serving.ranks import unservable
from molora.serving.refusals import why_not, why_not_module, why_not_place

ADAPTER = "default"


def load_layers(directory: str | Path, base: PretrainedConfig) -> dict[str, Any]:
    """Load an adapter, strictly, and refuse one that cannot be served.

    Args:
        directory: Its folder. Only its config and its safetensors file are read, and nothing in it is executed.
        base: Config of the base model.

    Returns:
        The adapted linears by their full names in the base model; the adapter's name is `ADAPTER`.

    Raises:
        ConfigError: If the folder is damaged or incomplete, of a newer format, does not fit the base model, or holds
            an adapter that servers cannot express.
    """
    directory = str(directory)
    config = read_adapter_config(directory)
    _check_fields(directory)
    if (reason := why_not(config)) is not None:
        raise unservable(directory, reason)
    tensors = read_adapter_tensors(directory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for training
            skeleton = _skeleton(base)
            with torch.device("meta"):  # nothing is drawn that is replaced below
                model = PeftModel(skeleton, config, adapter_name=ADAPTER)
            # Assigned instead of copied, and not by PEFT, which would move it all to where the base model has its
            # weights: nowhere. What is not in the file stays there too, and is found below.
            loaded = model.load_state_dict(_named(tensors), strict=False, assign=True)
    except (MoloraError, RuntimeError, ValueError, KeyError) as error:
        raise unusable(directory, f"does not fit the base model that is served: {error}") from error
    if loaded.unexpected_keys:
        message = (
            f"has tensors that its config and the base model that is served do not explain: "
            f"{_some(loaded.unexpected_keys)}; was it trained on another base model?"
        )
        raise unusable(directory, message)
    layers: dict[str, Any] = layers_of(model, ADAPTER)
    missing = [name for name, value in _values(model) if value.is_meta]
    if missing:
        raise unusable(directory, f"lacks {_some(missing)}; is the folder complete?")
    for key, layer in layers.items():
        if (reason := why_not_place(key) or why_not_module(config, layer.molora_plan[ADAPTER])) is not None:
            raise unservable(f"{directory} ({key})", reason)
    return {key: layer.eval() for key, layer in layers.items()}


def _check_fields(directory: str) -> None:
    """Refuse a field that nobody here reads, which PEFT drops with a warning: it might say how experts are chosen."""
    given = json.loads((Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
    known = [entry.name for entry in dataclasses.fields(MoLoraConfig)]
    unknown = [name for name in given if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], known) or " Was it written by a newer molora or PEFT?"
        raise unusable(directory, f"has an {CONFIG_FILE} with unknown fields: {', '.join(unknown)}.{hint}")


def _named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by their names in the model: the adapter's name stands behind the container."""
    return {re.sub(r"(\.molora_[^.]+)\.", rf"\1.{ADAPTER}.", name, count=1): value for name, value in tensors.items()}


def _skeleton(base: PretrainedConfig) -> nn.Module:
    name = next(iter(base.architectures or ()), "")
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise MoloraError(f"transformers {transformers.__version__} has no architecture {name!r}, which it names.")
    with torch.device("meta"):
        model: nn.Module = architecture(base)
    return model


def _values(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and saved buffers of the adapter."""
    saved = model.state_dict(keep_vars=True)
    return [(name, value) for name, value in saved.items() if ".molora_" in name]


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + f" and {len(names) - 2} more" * (len(names) > 2)
