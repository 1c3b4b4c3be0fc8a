"""Read a folder with a mixture as the LoRA that vLLM keeps in its caches and slots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.utils.torch_utils import PIN_MEMORY

from molora_vllm.layer import RoutedWrapper

GATES = "molora_gates"
"""Attribute of a `LoRAModel` that holds a mixture: its gates by the names of linears in vLLM."""

BASE, MISSING = "molora_base", "molora_missing"
"""Attributes of a `LoRAModelManager`: the config of its base model; why molora cannot route there, or `None`."""


def holds_mixture(path: str) -> bool:
    """Whether a folder's config says that it holds a mixture of molora's.

    Raises:
        ValueError: If the config cannot be read; of a file that is not there vLLM says so itself.
    """
    try:
        file = Path(get_adapter_absolute_path(path)) / "adapter_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError as error:
        raise ValueError(f"its adapter_config.json cannot be read ({error}); is the folder complete?") from error
    return isinstance(config, dict) and config.get("peft_type") == "MOLORA"


def load_mixture(worker: Any, request: Any) -> LoRAModel:
    """Load a mixture for the model of a worker.

    Args:
        worker: vLLM's `WorkerLoRAManager`.
        request: Its `LoRARequest`.

    Raises:
        ValueError: If this engine cannot serve it, or the folder is not whole, with what to do instead.
    """
    manager = worker._adapter_manager
    path = get_adapter_absolute_path(request.lora_path)
    try:
        _check_engine(manager)
        from molora.serving.skeleton import load_layers

        layers = load_layers(path, getattr(manager, BASE))
        return _model(manager, request.lora_int_id, layers)
    except ImportError as error:
        raise ValueError(f"{request.lora_name}: molora cannot be imported ({error}); `pip install molora`.") from error
    except ValueError as error:  # molora's errors are such
        folder = "" if str(path) in str(error) else f" ({path})"
        raise ValueError(f"{request.lora_name}{folder}: {error}") from error


def _model(manager: Any, lora_id: int, layers: dict[str, Any]) -> LoRAModel:
    from molora.serving.pack import pack
    from molora.serving.skeleton import ADAPTER

    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    mapper = None if mapper is None else mapper.get_rename_mapper()
    dtype = manager.lora_config.lora_dtype
    loras: dict[str, LoRALayerWeights] = {}
    gates = {}
    for key, layer in layers.items():
        name, _ = parse_fine_tuned_lora_name(f"base_model.model.{key}.lora_A.weight", mapper)
        wrapper = _wrapper_of(manager, name, key)
        packed = pack(layer, ADAPTER, dtype)
        if wrapper is not None:  # another stage's is kept as well: vLLM wants to see at least one linear
            _check_gate(wrapper, key, packed)
        a, b = (matrix.pin_memory() if PIN_MEMORY else matrix for matrix in (packed.a, packed.b))
        loras[name] = LoRALayerWeights(name, packed.rows, packed.rows, a, b)
        gates[name] = packed.gate
    rank = max((lora.rank for lora in loras.values()), default=1)
    _check_rank(rank, manager.lora_config.max_lora_rank)
    model = LoRAModel(lora_id, rank, loras)
    setattr(model, GATES, gates)
    return model


def _check_engine(manager: Any) -> None:
    if (missing := getattr(manager, MISSING)) is not None:
        raise ValueError(f"molora cannot be imported ({missing}); `pip install molora`, and start the server again.")
    if manager.lora_config.fully_sharded_loras:
        raise ValueError(
            "mixtures of experts cannot be served with --fully-sharded-loras, which multiplies A and B apart; leave "
            "it out."
        )
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError("mixtures of experts cannot be served with VLLM_LORA_ENABLE_DUAL_STREAM; unset it.")
    if manager.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"mixtures of experts are served on CPUs and CUDA devices, and this is {manager.device.type}."
        )


def _wrapper_of(manager: Any, name: str, key: str) -> RoutedWrapper | None:
    """What routes for a linear; `None` for one in another stage of a pipeline."""
    holder = next((module for module, members in manager.packed_modules.items() if name in members), name)
    wrapper = getattr(manager.modules.get(holder), "punica_wrapper", None)
    if isinstance(wrapper, RoutedWrapper):
        return wrapper
    if _is_elsewhere(manager.model, name):
        return None
    restricted = manager.lora_config.target_modules
    limit = f" --lora-target-modules allows {', '.join(restricted)} only." if restricted else ""
    raise ValueError(
        f"the mixture adapts {key}, where this engine has no linear for LoRAs: embeddings, the output layer and the "
        f"experts of an MoE model have none.{limit} Train it without, or merge: `molora export DIR OUT --as dense "
        "--calibrate data.jsonl`."
    )


def _is_elsewhere(model: Any, name: str) -> bool:
    part = model
    for step in name.split("."):
        part = getattr(part, step, None)
        if part is None or isinstance(part, PPMissingLayer):
            return part is not None
    return False


def _check_gate(wrapper: RoutedWrapper, key: str, packed: Any) -> None:
    if packed.gate is not None and (reason := wrapper.why_not(packed.gate)) is not None:
        raise ValueError(f"{key} cannot be routed here: {reason}")


def _check_rank(rank: int, allowed: int) -> None:
    from molora.serving.ranks import rank_for_vllm

    if rank > allowed:
        raise ValueError(
            f"the mixture takes rank {rank}, its experts' and the rows of its router, and the server has room for "
            f"{allowed}; start it with --max-lora-rank {rank_for_vllm(rank)}."
        )
