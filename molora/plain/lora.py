"""A plain LoRA, `y = W0 x + B A x`: what every server loads, written so that they all read it alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from molora.folders import WEIGHTS_FILE

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""


@dataclass(frozen=True)
class PlainLora:
    """One LoRA, its scale multiplied in.

    Attributes:
        factors: For each adapted linear, by its full name in the base model: A `[r, in]` and B `[out, r]`, fp32 or
            finer. The rank may differ from linear to linear.
        biases: For some of them what is added to the output, `[out]`; servers other than PEFT take none.
        fan_in_fan_out: Whether the base model stores its linears as `[in, out]`.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    @property
    def rank(self) -> int:
        """The highest rank of all linears, at least 1."""
        return max((len(a) for a, _ in self.factors.values()), default=1) or 1


def folder_bytes(lora: PlainLora, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of the file that `write_lora` writes, without what `others` adds."""
    numbers = sum((a.shape[1] + b.shape[0]) * lora.rank for a, b in lora.factors.values())
    return (numbers + sum(bias.numel() for bias in lora.biases.values())) * dtype.itemsize


def write_lora(
    lora: PlainLora,
    folder: Path,
    *,
    base_model: str | None,
    modules: Iterable[str],
    task_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    others: Mapping[str, Tensor] | None = None,
    other_fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that stock PEFT, vLLM and llama.cpp's converter read.

    All linears get the same rank, filled up with zeros, and `lora_alpha` equals it: llama.cpp and older vLLM read one
    rank and one alpha for the whole file, and drop patterns silently.

    Args:
        lora: What to write.
        folder: An empty folder.
        base_model: Name or folder of the base model.
        modules: Names of all modules of the base model, which decide how few target names say what is adapted.
        task_type: As in `PeftConfig`.
        dtype: Of the file.
        others: Tensors of other kinds, such as whole trained modules, by their names in the file.
        other_fields: Fields of `LoraConfig` that they need.
    """
    rank = lora.rank
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in lora.factors.items():
        missing = rank - len(a)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pad(a, (0, 0, 0, missing))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pad(b, (0, missing))
        if lora.biases:
            zeros = torch.zeros(b.shape[0], dtype=b.dtype, device=b.device)
            tensors[f"{PREFIX}{name}.lora_B.bias"] = lora.biases.get(name, zeros)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=target_names(lora.factors, modules),
        lora_dropout=0.0,
        bias=(other_fields or {}).get("bias", "none"),
        lora_bias=bool(lora.biases),
        fan_in_fan_out=lora.fan_in_fan_out,
        modules_to_save=(other_fields or {}).get("modules_to_save"),
        trainable_token_indices=(other_fields or {}).get("trainable_token_indices"),
        task_type=task_type,
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    saved = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    saved |= {name: tensor.detach().cpu().contiguous() for name, tensor in (others or {}).items()}
    save_file(saved, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def target_names(adapted: Iterable[str], modules: Iterable[str]) -> list[str]:
    """The fewest names that stand for exactly the adapted modules: last names where those are all adapted.

    Args:
        adapted: Full names of the adapted modules.
        modules: Full names of all modules of the base model.
    """
    wanted = set(adapted)
    last = {name.rpartition(".")[2] for name in wanted}
    partly = {name.rpartition(".")[2] for name in modules if name not in wanted} & last
    return sorted({name if name.rpartition(".")[2] in partly else name.rpartition(".")[2] for name in wanted})
