"""A whole model for llama.cpp: a GGUF file of the base model with a plain LoRA merged into its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from molora.errors import MoloraError, one_of
from molora.export.gguf import adapted_linears
from molora.export.gguf_template import Template, check_template, open_template, value
from molora.gguf_names import GgufLinear
from molora.plain.lora import PlainLora
from molora.progress import tracked
from molora.writing import check_place, new_file

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

OUTTYPES = ("template", "f32", "f16", "bf16", "q8_0")

ANOTHER_MODEL = 0.5
"""Relative difference between a template's weight and the base model's above which they are not the same weight.
Quantised to 2 bits they differ by about 0.3, two unrelated weights by 1.4."""

Weights = Callable[[str], Tensor]
"""Gives the base model's weight `[out, in]` of a linear by its full name; `[in, out]` with `fan_in_fan_out`."""


def write_gguf_model(
    lora: PlainLora,
    file: str | Path,
    *,
    template: str | Path | None,
    base_config: PreTrainedConfig,
    weights: Weights | None = None,
    outtype: str = "template",
    name: str = "",
) -> None:
    """Write a GGUF model: the template with the LoRA merged into the weights it changes.

    Metadata, tokenizer and all other tensors are copied bit by bit. A changed tensor is `W + B A`, where W is what the
    template holds, dequantised: the model that people run without the adapter. With `weights` it is the base model's
    own, which is more exact where the template is quantised; the result is then quantised once instead of twice.

    Args:
        lora: What to merge.
        file: A new file, usually `*.gguf`.
        template: A GGUF file of the base model, in any type that gguf can read.
        base_config: Config of the base model.
        weights: Where to take the weights of adapted linears from; the template's own without.
        outtype: Type of the changed tensors: `"f32"`, `"f16"`, `"bf16"`, `"q8_0"`, or `"template"` for the type that
            each has in the template.
        name: Written into the file as the adapter that was merged.

    Raises:
        MoloraError: If the template is missing, damaged or of another model, llama.cpp stores one of the linears
            differently, or a tensor cannot be written in the wanted type.
        WriteError: If the file cannot be written or exists.
    """
    if outtype not in OUTTYPES:
        raise MoloraError(f"outtype of a GGUF model: {one_of(outtype, OUTTYPES)}")
    check_place(file)
    linears = adapted_linears(lora, base_config)
    opened = open_template(template)
    check_template(opened, lora, linears, base_config)
    changed = {f"{linear.tensor}.weight": module for module, linear in linears.items()}
    added = _biases(lora, linears, opened)
    types = {tensor: _type(opened, tensor, outtype) for tensor in changed}
    with new_file(file, _bytes(opened, types)) as partial:
        _write(partial, opened, types, _merged(opened, lora, linears, changed, added, weights), lora, name, outtype)


def _write(
    file: Path,
    template: Template,
    types: Mapping[str, Any],
    merged: Iterator[np.ndarray[Any, Any] | None],
    lora: PlainLora,
    name: str,
    outtype: str,
) -> None:
    """Write the header, then tensor by tensor in the template's order; `merged` gives None for what stays."""
    from gguf import GGUFWriter, quantize

    writer = GGUFWriter(file, value(template, "general.architecture"))
    try:
        _copy_metadata(writer, template)
        _describe(writer, template, lora, types, name, outtype)
        for tensor in template.reader.tensors:
            kind = types.get(tensor.name, tensor.tensor_type)
            shape = [int(length) for length in reversed(tensor.shape.tolist())]
            # A type other than uint8 keeps the writer from taking the shape for one in bytes.
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), _tensor_bytes(tensor, kind), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pairs = zip(template.reader.tensors, merged, strict=True)
        for tensor, values in tracked(pairs, "writing", "tensor", total=len(template.reader.tensors)):
            if values is None:
                writer.write_tensor_data(tensor.data)
            else:
                _check_finite(values, tensor.name)
                with np.errstate(over="ignore"):  # found below
                    written = quantize(values, types.get(tensor.name, tensor.tensor_type))
                _check_finite(written, tensor.name)
                writer.write_tensor_data(written)
    finally:
        writer.close()


def _merged(
    template: Template,
    lora: PlainLora,
    linears: Mapping[str, GgufLinear],
    changed: Mapping[str, str],
    added: Mapping[str, Tensor],
    weights: Weights | None,
) -> Iterator[np.ndarray[Any, Any] | None]:
    from gguf import dequantize

    for tensor in template.reader.tensors:
        if tensor.name in changed:
            module = changed[tensor.name]
            base = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True))
            if weights is not None:
                base = _given(weights(module), lora, linears[module], base, tensor.name, template)
            a, b = lora.factors[module]
            a, b = a.detach().cpu(), linears[module].rows(b.detach().cpu())
            yield (base.to(b.dtype) + b @ a).float().contiguous().numpy()
        elif tensor.name in added:
            base = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True))
            yield (base + added[tensor.name]).contiguous().numpy()
        else:
            yield None


def _given(
    weight: Tensor, lora: PlainLora, linear: GgufLinear, held: Tensor, tensor: str, template: Template
) -> Tensor:
    """Bring the base model's weight into llama.cpp's order, and refuse it if the template holds another one."""
    weight = weight.detach().to("cpu", torch.float32)
    weight = linear.rows(weight.T if lora.fan_in_fan_out else weight)
    difference = torch.linalg.vector_norm(weight - held) / torch.linalg.vector_norm(weight).clamp_min(1e-30)
    if not difference <= ANOTHER_MODEL:
        raise MoloraError(
            f"{tensor} of {str(template.file)!r} differs from the base model's by {float(difference):.2f} of its "
            "size, more than any quantisation does. It is a GGUF file of another model; give one of the base model."
        )
    return weight


def _biases(lora: PlainLora, linears: Mapping[str, GgufLinear], template: Template) -> dict[str, Tensor]:
    """Biases by the tensor they are added to, rows in llama.cpp's order `[out]`."""
    found = {}
    for module, bias in lora.biases.items():
        if not bool(bias.any()):
            continue
        tensor = f"{linears[module].tensor}.bias"
        if tensor not in template.tensors:
            raise MoloraError(
                f"the adapter adds a bias to {module!r}, and llama.cpp's model has no {tensor} to add it to. Export "
                "it without the bias."
            )
        found[tensor] = linears[module].rows(bias.detach().to("cpu", torch.float32))
    return found


def _type(template: Template, tensor: str, outtype: str) -> Any:
    """The type that a changed tensor is written in, if it can be."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, QuantError, dequantize, quantize

    held = template.tensors[tensor]
    kind = held.tensor_type if outtype == "template" else GGMLQuantizationType[outtype.upper()]
    block, _ = GGML_QUANT_SIZES[kind]
    columns = int(held.shape[0])
    if columns % block:
        raise MoloraError(
            f"{tensor} has rows of {columns} numbers, and {kind.name.lower()} takes multiples of {block}. Write f16."
        )
    try:
        quantize(np.zeros((1, columns), dtype=np.float32), kind)
        dequantize(held.data[:1], held.tensor_type)
    except (NotImplementedError, QuantError) as error:
        raise MoloraError(
            f"the gguf package cannot turn {tensor} of the template from {held.tensor_type.name.lower()} into "
            f"{kind.name.lower()} ({error}). Give a template in f16, bf16 or q8_0, write one of these, and run "
            "`llama-quantize` on the result."
        ) from error
    return kind


def _copy_metadata(writer: Any, template: Template) -> None:
    from gguf import GGUFValueType

    for field in template.reader.fields.values():
        # The first is written by the writer, the others are counts of the file itself.
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        # An empty array keeps no type of its entries; llama.cpp reads none of those.
        if kind == GGUFValueType.ARRAY and len(field.types) < 2:
            continue
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    if (alignment := value(template, "general.alignment")) is not None:
        writer.data_alignment = int(alignment)


def _describe(
    writer: Any, template: Template, lora: PlainLora, types: Mapping[str, Any], name: str, outtype: str
) -> None:
    """Say what was merged, under keys of molora's own, which llama.cpp shows and does not read."""
    from gguf import GGML_QUANT_VERSION, GGUFValueType, Keys

    writer.add_string("molora.merged.adapter", name)
    writer.add_uint32("molora.merged.rank", lora.rank)
    writer.add_uint32("molora.merged.tensors", len(types))
    writer.add_string("molora.merged.type", outtype)
    writer.add_string("molora.merged.template", template.file.name)
    if value(template, "general.quantization_version") is None:
        writer.add_key_value("general.quantization_version", GGML_QUANT_VERSION, GGUFValueType.UINT32)
    if (kind := _file_type(template, types)) is not None:
        writer.add_key_value(Keys.General.FILE_TYPE, kind, GGUFValueType.UINT32)


def _file_type(template: Template, types: Mapping[str, Any]) -> int | None:
    """The name of the type that most numbers have now; None if that is as in the template, or has no such name."""
    from gguf import GGMLQuantizationType, LlamaFileType

    before: Counter[Any] = Counter()
    after: Counter[Any] = Counter()
    for tensor in template.reader.tensors:
        before[tensor.tensor_type] += int(tensor.n_elements)
        after[types.get(tensor.name, tensor.tensor_type)] += int(tensor.n_elements)
    most = max(after, key=lambda kind: after[kind])
    names = {
        GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
        GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
        GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
        GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    }
    return None if most == max(before, key=lambda kind: before[kind]) or most not in names else int(names[most])


def _bytes(template: Template, types: Mapping[str, Any]) -> int:
    tensors = template.reader.tensors
    aligned = len(tensors) * int(template.reader.alignment)
    return int(template.reader.data_offset) + aligned + sum(_tensor_bytes(t, types.get(t.name)) for t in tensors)


def _tensor_bytes(tensor: Any, kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    if kind is None or kind == tensor.tensor_type:
        return int(tensor.n_bytes)
    block, length = GGML_QUANT_SIZES[kind]
    return int(tensor.n_elements) // block * length


def _check_finite(written: np.ndarray[Any, Any], tensor: str) -> None:
    if written.dtype.kind == "f" and not np.isfinite(written).all():
        raise MoloraError(
            f"{tensor} has numbers that {written.dtype} cannot hold once merged. Write f32 or bf16, or train the "
            "adapter again if it has NaN or infinity."
        )
