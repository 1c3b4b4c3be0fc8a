"""A plain LoRA as one file that llama.cpp loads beside a GGUF of the base model: `llama-cli --lora FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from molora.errors import MoloraError, one_of
from molora.gguf_names import GgufLinear, architecture_of, gguf_linears, import_gguf
from molora.plain.lora import PlainLora
from molora.writing import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LORA_TYPES = ("f32", "f16")
HEADER_ROOM = 2**16
"""Bytes for the names and metadata of an adapter."""


def write_gguf_lora(
    lora: PlainLora,
    file: str | Path,
    *,
    base_config: PreTrainedConfig,
    outtype: str = "f32",
    name: str = "",
    base_model: str = "",
) -> None:
    """Write a LoRA adapter for llama.cpp.

    llama.cpp multiplies each pair by `alpha / rank`, with one alpha for the file. All pairs therefore get the highest
    rank, filled up with zeros, and alpha equals it: the factor is 1, as the scales are in the factors. Linears of
    rank 0 are left out.

    Args:
        lora: What to write.
        file: A new file, usually `*.gguf`.
        base_config: Config of the base model; it decides names and the order of rows.
        outtype: Type of the numbers, `"f32"` or `"f16"`.
        name: Written into the file as its name.
        base_model: Written into the file as the name of its base model.

    Raises:
        MoloraError: If llama.cpp has no adapter for one of the linears, their shapes do not fit the base model, there
            are biases, or a number is too large for the type.
        WriteError: If the file cannot be written or exists.
    """
    import_gguf()
    from gguf import GGUFWriter

    if outtype not in LORA_TYPES:
        raise MoloraError(f"outtype of a LoRA for llama.cpp: {one_of(outtype, LORA_TYPES)}")
    dtype = np.dtype(np.float32 if outtype == "f32" else np.float16)
    linears = adapted_linears(lora, base_config)
    refuse_biases(lora)
    pairs = [(name, linear, lora.factors[name]) for name, linear in linears.items()]
    needs = HEADER_ROOM + sum((a.shape[1] + b.shape[0]) * lora.rank * dtype.itemsize for _, _, (a, b) in pairs)
    with new_file(file, needs) as partial:
        writer = GGUFWriter(partial, architecture_of(base_config).name)
        try:
            _describe(writer, lora.rank, outtype, name, base_model)
            for _, linear, (a, b) in pairs:
                for suffix, shape in (("a", (lora.rank, a.shape[1])), ("b", (b.shape[0], lora.rank))):
                    size = int(np.prod(shape)) * dtype.itemsize
                    writer.add_tensor_info(f"{linear.tensor}.weight.lora_{suffix}", shape, dtype, size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for module, linear, (a, b) in pairs:
                missing = lora.rank - len(a)
                writer.write_tensor_data(_numbers(pad(a, (0, 0, 0, missing)), dtype, module))
                writer.write_tensor_data(_numbers(linear.rows(pad(b, (0, missing))), dtype, module))
        finally:
            writer.close()


def adapted_linears(lora: PlainLora, config: PreTrainedConfig) -> dict[str, GgufLinear]:
    """Find the tensors of the linears that a LoRA changes.

    Args:
        lora: The LoRA; what has rank 0 and no bias is left out.
        config: Of the base model.

    Raises:
        MoloraError: If one has none, or the heads do not divide its rows, or nothing is adapted.
    """
    names = [name for name, (a, _) in lora.factors.items() if len(a) or name in lora.biases]
    if not names:
        raise MoloraError("this adapter changes no linear, so there is nothing to write for llama.cpp.")
    linears = gguf_linears(names, config)
    for name, linear in linears.items():
        rows = lora.factors[name][1].shape[0]
        if linear.heads and rows % (2 * linear.heads):
            raise MoloraError(
                f"{name!r} has {rows} outputs and the base model's config {linear.heads} heads, which does not go "
                "together. Give the config of the model that the adapter was trained on."
            )
    return linears


def refuse_biases(lora: PlainLora) -> None:
    """Refuse a LoRA that adds to the output what no LoRA of llama.cpp can hold.

    Raises:
        MoloraError: If it has a bias other than zero.
    """
    changed = [name for name, bias in lora.biases.items() if bool(bias.any())]
    if changed:
        raise MoloraError(
            f"the adapter adds a bias to {changed[0]!r}{f' and {len(changed) - 1} more' if changed[1:] else ''}, and "
            "a LoRA of llama.cpp has none. Export it without the bias, or export the dense model."
        )


def _describe(writer: Any, rank: int, outtype: str, name: str, base_model: str) -> None:
    from gguf import GGUFType, Keys, LlamaFileType

    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(rank))
    writer.add_file_type(LlamaFileType.ALL_F32 if outtype == "f32" else LlamaFileType.MOSTLY_F16)
    if name:
        writer.add_name(name)
    if base_model:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_model)


def _numbers(tensor: Tensor, dtype: np.dtype[Any], module: str) -> np.ndarray[Any, Any]:
    with np.errstate(over="ignore"):  # found below
        values: np.ndarray[Any, Any] = tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype(dtype)
    if not np.isfinite(values).all():
        raise MoloraError(
            f"the LoRA of {module!r} has numbers that {dtype} cannot hold. Write f32, or train it again if it has "
            "NaN or infinity."
        )
    return values
