"""A GGUF file of the base model: what it must be so that an adapter can be merged into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.errors import MoloraError
from molora.gguf_names import GgufLinear, architecture_of, import_gguf
from molora.plain.lora import PlainLora

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DENSE = "the dense export and llama.cpp's `convert_hf_to_gguf.py`"

# Keys of a GGUF file behind the architecture's name, and fields of the config that must equal them.
SAME = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}

# What a damaged file makes the reader of gguf stumble over: it checks no length before it reads.
UNREADABLE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, OSError)


@dataclass(frozen=True)
class Template:
    """An open GGUF file of a base model; its tensors are mapped, not loaded.

    Attributes:
        file: Where it is.
        reader: gguf's reader of it.
        tensors: Its tensors by name.
    """

    file: Path
    reader: Any
    tensors: Mapping[str, Any]


def open_template(file: str | Path | None) -> Template:
    """Open a GGUF file and read all of its metadata.

    Args:
        file: Its path; None if there is none.

    Raises:
        MoloraError: If there is none, it cannot be read, or is a part of a split model or for other machines.
    """
    import_gguf()
    from gguf import GGUFReader

    if file is None:
        raise MoloraError(
            "a whole model for llama.cpp needs a GGUF file of the base model, which holds the tokenizer and all that "
            f"the adapter does not change. Give one, or use {DENSE}."
        )
    path = Path(file).expanduser()
    if not path.is_file():
        raise MoloraError(f"there is no GGUF file {str(path)!r}. Give a GGUF file of the base model, or use {DENSE}.")
    try:
        reader = GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        fields = {name: field.contents() for name, field in reader.fields.items()}
        cut = any(tensor.data_offset + tensor.n_bytes > path.stat().st_size for tensor in tensors.values())
    except UNREADABLE as error:
        raise MoloraError(
            f"{str(path)!r} is no GGUF file that can be read, or is damaged ({_first_line(error)}). Get it again."
        ) from error
    if cut or not tensors:
        raise MoloraError(f"{str(path)!r} ends too early or holds no tensors. Get it again.")
    if reader.byte_order == "S":
        raise MoloraError(f"{str(path)!r} was written for machines with another order of bytes. Get one for this one.")
    if int(fields.get("split.count") or 1) > 1:
        raise MoloraError(
            f"{str(path)!r} is one part of a split model. Join it with `llama-gguf-split --merge` first."
        )
    return Template(path, reader, tensors)


def value(template: Template, key: str) -> Any:
    """Read a field of its metadata; None if it has none of that name."""
    field = template.reader.fields.get(key)
    return None if field is None else field.contents()


def check_template(
    template: Template, lora: PlainLora, linears: Mapping[str, GgufLinear], config: PreTrainedConfig
) -> None:
    """Refuse a template that is not of the base model.

    Args:
        template: The file.
        lora: What is to be merged.
        linears: The tensors that it changes.
        config: Of the base model.

    Raises:
        MoloraError: Naming everything that differs.
    """
    name = architecture_of(config).name
    wrong = []
    kind = value(template, "general.type") or "model"
    if kind != "model":
        wrong.append(f"it holds no model but is of type {kind!r}")
    if (given := value(template, "general.architecture")) != name:
        wrong.append(f"its architecture is {given!r}, the base model's {name!r}")
    else:
        wrong += _differing_sizes(template, name, config)
    for module, linear in linears.items():
        if len(wrong) > 3:
            break
        wrong += _differing_tensor(template, module, linear, lora)
    if wrong:
        raise MoloraError(
            f"{str(template.file)!r} is not a GGUF file of the base model: {'; '.join(wrong)}. Give one that was made "
            f"from the model the adapter was trained on, or use {DENSE}."
        )


def _differing_sizes(template: Template, name: str, config: PreTrainedConfig) -> list[str]:
    wrong = []
    for key, field in SAME.items():
        given, wanted = value(template, f"{name}.{key}"), getattr(config, field, None)
        if isinstance(given, int) and isinstance(wanted, int) and given != wanted:
            wrong.append(f"its {key} is {given}, the base model's {field} {wanted}")
    return wrong


def _differing_tensor(template: Template, module: str, linear: GgufLinear, lora: PlainLora) -> list[str]:
    a, b = lora.factors[module]
    tensor = template.tensors.get(f"{linear.tensor}.weight")
    if tensor is None:
        return [f"it has no {linear.tensor}.weight, which is {module!r}"]
    has = tuple(int(length) for length in reversed(tensor.shape.tolist()))
    wanted = (b.shape[0], a.shape[1])
    return [] if has == wanted else [f"its {linear.tensor}.weight is {list(has)}, the adapter's {list(wanted)}"]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
