"""Where vLLM is changed: four methods, each of which does what it did before and then something more."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
from importlib.metadata import version
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import ClassificationHeadWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager

from molora_vllm.adapter import BASE, GATES, MISSING, holds_mixture, load_mixture
from molora_vllm.layer import RoutedWrapper, SlotTokens

_INSTALLED = "_molora_installed"
logger = logging.getLogger("vllm.plugins.molora")


def install() -> None:
    """Put the hooks in place, once for a process."""
    if getattr(LoRAModelManager, _INSTALLED, False):
        return
    setattr(LoRAModelManager, _INSTALLED, True)
    LoRAModelManager.__init__ = _routing(LoRAModelManager.__init__)
    LoRAModelManager.activate_adapter = _activating(LoRAModelManager.activate_adapter)
    WorkerLoRAManager._load_adapter = _loading(WorkerLoRAManager._load_adapter)
    LoRAConfig.compute_hash = _hashing(LoRAConfig.compute_hash)


def _routing(plain: Any) -> Any:
    """Every linear that takes LoRAs gets a wrapper of its own, which can route."""
    parameters = inspect.signature(plain)

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        given = parameters.bind(self, *args, **kwargs).arguments
        setattr(self, BASE, given["vllm_config"].model_config.hf_config)
        device = torch.device(self.device).type
        setattr(self, MISSING, _missing() if device == "cuda" else None)
        if device not in ("cpu", "cuda") or getattr(self, MISSING) is not None:
            return  # LoRAs go on as before, and mixtures are refused
        tokens: dict[int, SlotTokens] = {}
        for layer in self.modules.values():
            if isinstance(layer, BaseLinearLayerWithLoRA) and not isinstance(layer, ClassificationHeadWithLoRA):
                shared = layer.punica_wrapper
                if id(shared) not in tokens:
                    tokens[id(shared)] = SlotTokens(shared)
                layer.set_mapping(RoutedWrapper(shared, layer, tokens[id(shared)]))

    return init


def _missing() -> str | None:
    """Why molora cannot be imported, which routes on a GPU from the start; `None` if it can."""
    try:
        import molora.serving.op  # noqa: F401
    except ImportError as error:
        logger.error("mixtures of experts are refused: molora cannot be imported (%s); `pip install molora`.", error)
        return str(error)
    return None


def _hashing(plain: Any) -> Any:
    """Graphs that were compiled without the plug-in, or with another version of it, are others: they may not route."""

    @functools.wraps(plain)
    def compute_hash(self: Any) -> str:
        text = f"{plain(self)} molora {version('molora')}"
        return hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()

    return compute_hash


def _activating(plain: Any) -> Any:
    """What is copied into a slot takes its gates along; a plain LoRA, that it has none."""

    @functools.wraps(plain)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        active: bool = plain(self, lora_id)
        if not active:
            return active  # it is in its slot already
        slot = self.lora_index_to_id.index(lora_id)
        adapter = self._registered_adapters[lora_id]
        gates = getattr(adapter, GATES, {})
        for name, layer in self.modules.items():
            wrapper = getattr(layer, "punica_wrapper", None)
            if isinstance(wrapper, RoutedWrapper):
                weights = self._get_lora_layer_weights(adapter, name)
                members = self.packed_modules.get(name, [name])
                wrapper.fill(slot, weights, [gates.get(member) for member in members])
        return active

    return activate_adapter


def _loading(plain: Any) -> Any:
    """A folder with a mixture is read by us, every other as before."""

    @functools.wraps(plain)
    def load_adapter(self: Any, lora_request: Any) -> Any:
        try:
            is_ours = holds_mixture(lora_request.lora_path)
        except ValueError as error:  # vLLM's server shows no paths, so the name has to say which it is
            raise ValueError(f"{lora_request.lora_name}: {error}") from error
        return load_mixture(self, lora_request) if is_ours else plain(self, lora_request)

    return load_adapter
