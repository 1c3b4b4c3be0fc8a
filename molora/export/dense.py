"""A base model with the adapter merged in: a plain transformers folder, in the base model's own dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.errors import MergeError, MoloraError
from molora.plain.lora import PlainLora
from molora.plain.stand_in import HowToMerge

SHARD = "5GB"
"""Most bytes of one file, as transformers' own default for large models."""


def dense_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights without adapters, in a dtype."""
    return sum(p.numel() for name, p in model.named_parameters() if "molora_" not in name) * dtype.itemsize


def merge_dense(model: Any, lora: PlainLora | None = None, dtype: torch.dtype | None = None, **how: Any) -> Any:
    """Merge the active adapter of a model, and return the base model in one dtype.

    The sum is computed in fp32 and rounded once.

    Args:
        model: A PEFT model; its base weights change.
        lora: What to merge in place of the adapter; by default what it exactly is.
        dtype: Of the result; default the one the base model's configuration names.
        **how: As `merge_adapter` takes it.

    Raises:
        MergeError: If base weights are quantised, or shared with another module.
    """
    base = model.get_base_model()
    if getattr(base, "quantization_method", None) is not None:
        raise MergeError(
            "the base model is quantised; merging into quantised weights would round the adapter away. Pass "
            "`--dequantize` to write a dequantised model with the adapter merged in, or export a LoRA, which loads on "
            "the quantised base."
        )
    dtype = dtype or _own_dtype(base)
    chosen: HowToMerge = {**how}  # type: ignore[typeddict-item]  # checked where it is used
    if lora is not None:
        if lora.biases:
            raise MergeError("a fitted constant has no place in a linear without bias; leave `bias` out.")
        chosen["factors"] = lora.factors
    merged = model.merge_and_unload(safe_merge=True, **chosen)
    return merged.to(dtype)


def save_dense(merged: Any, tokenizer: Any, folder: Path) -> None:
    """Write a merged model and its tokenizer, in shards if it is large."""
    merged.save_pretrained(str(folder), max_shard_size=SHARD)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def dequantized(base: Any) -> Any:
    """The model with weights that are no longer quantised.

    Raises:
        MoloraError: If its kind of quantisation cannot be undone.
    """
    try:
        return base.dequantize()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise MoloraError(
            f"this base model cannot be dequantised ({error}); merge into one in full precision."
        ) from error


def _own_dtype(base: Any) -> torch.dtype:
    saved = base.config.get_text_config().dtype
    dtype = getattr(torch, saved) if isinstance(saved, str) else saved
    return dtype or next(base.parameters()).dtype
