"""Where vLLM is changed: three methods, each of which does what it did before and then something more."""

from __future__ import annotations

import functools
from typing import Any

from vllm.lora.layers import ClassificationHeadWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.worker_manager import WorkerLoRAManager

from molora_vllm.adapter import GATES, holds_mixture, load_mixture
from molora_vllm.layer import RoutedWrapper, SlotTokens

_INSTALLED = "_molora_installed"


def install() -> None:
    """Put the hooks in place, once for a process."""
    if getattr(LoRAModelManager, _INSTALLED, False):
        return
    setattr(LoRAModelManager, _INSTALLED, True)
    LoRAModelManager.__init__ = _routing(LoRAModelManager.__init__)
    LoRAModelManager.activate_adapter = _activating(LoRAModelManager.activate_adapter)
    WorkerLoRAManager._load_adapter = _loading(WorkerLoRAManager._load_adapter)


def _routing(plain: Any) -> Any:
    """Every linear that takes LoRAs gets a wrapper of its own, which can route."""

    @functools.wraps(plain)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        tokens: dict[int, SlotTokens] = {}
        for layer in self.modules.values():
            if isinstance(layer, BaseLinearLayerWithLoRA) and not isinstance(layer, ClassificationHeadWithLoRA):
                shared = layer.punica_wrapper
                if id(shared) not in tokens:
                    tokens[id(shared)] = SlotTokens(shared)
                layer.set_mapping(RoutedWrapper(shared, layer, tokens[id(shared)]))

    return init


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
