"""What llama.cpp calls the linears of a transformers model, and in which order it stores their rows.

Only linears that are one tensor there, with the same rows or with the rows of each head reordered, are known here:
what an adapter of one of them becomes is then exact. The rules are those of llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from molora.errors import MoloraError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LORA_CONVERTER = "llama.cpp's `convert_lora_to_gguf.py`"
GGUF_HINT = 'pip install "molora[gguf]"'

# llama.cpp tensor name -> transformers parameter name, inside one block and outside all blocks of a Llama.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores the models of one `model_type` of transformers.

    Attributes:
        name: Its name there, `general.architecture` of a file.
        rotary: Whether the rows of queries and keys are reordered: llama.cpp then rotates neighbours, transformers
            the two halves of a head.
    """

    name: str
    rotary: bool = False


ARCHITECTURES = {
    "arcee": Architecture("arcee", rotary=True),
    "cohere": Architecture("command-r"),
    "cohere2": Architecture("cohere2"),
    "exaone4": Architecture("exaone4"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "glm4": Architecture("glm4"),
    "gpt2": Architecture("gpt2"),
    "granite": Architecture("granite", rotary=True),
    "llama": Architecture("llama", rotary=True),
    "mistral": Architecture("llama", rotary=True),
    "nemotron": Architecture("nemotron"),
    "olmo": Architecture("olmo", rotary=True),
    "olmo2": Architecture("olmo2"),
    "olmo3": Architecture("olmo2"),
    "phi": Architecture("phi2"),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", rotary=True),
    "stablelm": Architecture("stablelm"),
    "starcoder2": Architecture("starcoder2"),
}
"""By `model_type`. Fused or reordered attention (Falcon, GPT-NeoX, Bloom), experts of the base model and models that
read more than text are missing on purpose: there a linear is not one tensor."""

LINEARS = ("ATTN_Q", "ATTN_K", "ATTN_V", "ATTN_QKV", "ATTN_OUT", "FFN_GATE", "FFN_UP", "FFN_DOWN", "OUTPUT")
"""Tensors of llama.cpp to which it adds a LoRA; names from gguf's `MODEL_TENSOR`."""


@dataclass(frozen=True)
class GgufLinear:
    """A linear of the base model as llama.cpp stores it.

    Attributes:
        tensor: Its name there, without `.weight`.
        heads: Heads over which its rows are reordered; 0 if they are not.
    """

    tensor: str
    heads: int = 0

    def rows(self, given: Tensor) -> Tensor:
        """Put the rows of a weight, of a LoRA's B, or of a bias, in llama.cpp's order."""
        return permute(given, self.heads) if self.heads else given


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Find how llama.cpp stores a model.

    Args:
        config: Of the base model.

    Raises:
        MoloraError: If molora does not know.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise MoloraError(
            f"molora writes no GGUF for models of type {kind!r}, where a linear of transformers is not one tensor of "
            f"llama.cpp or nobody checked that it is; it does for {', '.join(ARCHITECTURES)}."
            f"{did_you_mean(kind, ARCHITECTURES)} Export a plain LoRA folder instead and give it to {LORA_CONVERTER}."
        )
    return ARCHITECTURES[kind]


def gguf_linears(names: list[str], config: PreTrainedConfig) -> dict[str, GgufLinear]:
    """Find what llama.cpp calls linears.

    Args:
        names: Their full names in the base model.
        config: Of the base model.

    Returns:
        For each name its tensor, in the order given.

    Raises:
        MoloraError: If the model or one of the linears has no counterpart, naming all of them.
    """
    import_gguf()
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, get_tensor_name_map

    architecture = architecture_of(config)
    arch = next(MODEL_ARCH(key) for key, value in MODEL_ARCH_NAMES.items() if value == architecture.name)
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    kinds = {MODEL_TENSOR[name] for name in LINEARS}
    found: dict[str, GgufLinear] = {}
    unknown = []
    for name in names:
        entry = table.get_type_and_name(name)
        tied = entry is not None and entry[0] == MODEL_TENSOR.OUTPUT and config.tie_word_embeddings
        if entry is None or entry[0] not in kinds or tied:
            unknown.append(name)
            continue
        found[name] = GgufLinear(entry[1], _heads(entry[0].name, config) if architecture.rotary else 0)
    if unknown:
        more = f" and {len(unknown) - 3} more" if unknown[3:] else ""
        raise MoloraError(
            f"llama.cpp adapts the linears of attention and feed-forward blocks of a {architecture.name!r} model, and "
            f"an output layer that is not its embedding too; not {', '.join(map(repr, unknown[:3]))}{more}. Leave "
            "them out of `target_modules`, or export the dense model and give it to llama.cpp's "
            "`convert_hf_to_gguf.py`."
        )
    return found


def import_gguf() -> None:
    """Say what to install where the gguf package is missing.

    Raises:
        MoloraError: If it is.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MoloraError(f"GGUF files need the gguf package: {GGUF_HINT}") from error


def permute(rows: Tensor, heads: int) -> Tensor:
    """Interleave the two rotary halves of each head in the rows of a query or key matrix `[N, D]` or bias `[N]`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undo `permute`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def parameter_name(name: str) -> tuple[str, str]:
    """Return the transformers name of a Llama's tensor and its kind inside the block, `""` outside all blocks."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name], ""
    _, block, kind, suffix = name.split(".")
    return f"model.layers.{block}.{BLOCK_NAMES[kind]}.{suffix}", kind


def _heads(kind: str, config: PreTrainedConfig) -> int:
    if kind == "ATTN_Q":
        return int(config.num_attention_heads)
    if kind == "ATTN_K":
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return 0
