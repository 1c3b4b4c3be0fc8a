"""Whether this vLLM is one that the plug-in fits: what it replaces and calls, by names and signatures."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests ran with."""

_USED = {
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": ("self", "lora_request"),
    "vllm.lora.model_manager:LoRAModelManager.__init__": (
        *("self", "model", "max_num_seqs", "max_num_batched_tokens", "vocab_size", "lora_config", "device"),
        "vllm_config",
    ),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": ("self", "lora_id"),
    "vllm.lora.model_manager:LoRAModelManager._get_lora_layer_weights": ("self", "lora_model", "module_name"),
    "vllm.lora.lora_model:LoRAModel.__init__": (
        *("self", "lora_model_id", "rank", "loras", "is_3d_lora_weight", "modules_to_save"),
    ),
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": (
        *("self", "module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling"),
    ),
    "vllm.lora.layers.base:BaseLayerWithLoRA.set_mapping": ("self", "punica_wrapper"),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA._apply_lora_to_output": ("self", "x", "output"),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.update_metadata": (
        *("self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"),
    ),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.add_shrink": (
        *("self", "y", "x", "lora_a_stacked", "scale", "kwargs"),
    ),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.add_expand": (
        *("self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs"),
    ),
    "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase.add_lora_linear": (
        *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"),
    ),
    "vllm.config.lora:LoRAConfig.compute_hash": ("self",),
    "vllm.lora.utils:parse_fine_tuned_lora_name": ("name", "weights_mapper"),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.distributed:tensor_model_parallel_all_reduce": ("input_",),
}
"""What is replaced or called, and its parameters in order."""

_NAMES = (
    "vllm.lora.layers.row_parallel_linear:RowParallelLinearWithLoRA",
    "vllm.lora.layers:ClassificationHeadWithLoRA",
    "vllm.model_executor.models.utils:PPMissingLayer",
    "vllm.utils.torch_utils:PIN_MEMORY",
    "vllm.envs:VLLM_LORA_ENABLE_DUAL_STREAM",
)


def version() -> str:
    """Version of the installed vLLM, without what a build adds behind a plus."""
    import vllm

    return str(vllm.__version__).partition("+")[0]


def versions() -> tuple[str, str]:
    """The installed version and the tested ones, for messages."""
    return f"vLLM {version()}", ", ".join(TESTED)


def is_tested() -> bool:
    """Whether the tests ran with the installed version."""
    return version() in TESTED


def differences() -> list[str]:
    """What is missing in the installed vLLM, or takes other parameters; empty if it fits."""
    return list(_differences())


def _differences() -> Iterator[str]:
    for name, expected in _USED.items():
        found = _find(name)
        if found is None:
            yield f"there is no {_short(name)}"
            continue
        try:
            parameters = tuple(inspect.signature(found).parameters)
        except (TypeError, ValueError):
            yield f"{_short(name)} cannot be called as it was"
            continue
        if parameters != expected:
            yield f"{_short(name)} takes ({', '.join(parameters)}) instead of ({', '.join(expected)})"
    yield from (f"there is no {_short(name)}" for name in _NAMES if _find(name) is None)


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception:  # whatever a version that differs may raise: the engine goes on without mixtures
        return None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _short(name: str) -> str:
    return name.rpartition(":")[2]
