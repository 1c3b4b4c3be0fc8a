"""`MoLoraModel`: puts molora layers into a model, the way every PEFT tuner does."""

from __future__ import annotations

import re
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config import MoLoraConfig
from molora.errors import TargetModulesError
from molora.layer import MoLoraLayer, MoLoraLinear, cannot_merge
from molora.row_adapters import adapters_by_row
from molora.targets import check_targets


class MoLoraModel(BaseTuner):
    """A model whose matched linear layers carry mixtures of LoRA experts.

    Made by `get_peft_model(model, MoLoraConfig(...))`; everything a user calls is PEFT's.

    Args:
        model: The base model.
        peft_config: Configuration, or one per adapter name.
        adapter_name: Name of the first adapter.

    Raises:
        TargetModulesError: If `target_modules` names something the model does not have, or that is no linear layer.
    """

    prefix = "molora_"
    tuner_layer_cls = MoLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: MoLoraConfig, model: nn.Module) -> None:
        # The last hook before modules are replaced: nothing is half-done if the targets turn out wrong.
        check_targets(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r = _by_pattern(peft_config.rank_pattern, current_key, peft_config.r)
        lora_alpha = _by_pattern(peft_config.alpha_pattern, current_key, peft_config.lora_alpha)
        if isinstance(target, MoLoraLayer):
            target.update_layer(adapter_name, peft_config, r, lora_alpha, inference_mode=peft_config.inference_mode)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _is_linear(base):
            raise TargetModulesError(
                f"target module {current_key!r} is a {type(base).__name__}, which molora cannot adapt; it adapts "
                "torch.nn.Linear, transformers' Conv1D and quantised linears. Leave it out with `exclude_modules`, or "
                "train it fully with `modules_to_save`."
            )
        is_conv1d = isinstance(base, Conv1D)
        if isinstance(base, nn.Linear | Conv1D) and peft_config.fan_in_fan_out != is_conv1d:
            if peft_config.fan_in_fan_out:
                warnings.warn(f"{current_key} is a {type(base).__name__}: setting fan_in_fan_out=False.", stacklevel=2)
            peft_config.fan_in_fan_out = is_conv1d
        layer = MoLoraLinear(target, adapter_name, peft_config, r, lora_alpha, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, all of them or, if one cannot be merged, none.

        Raises:
            MergeError: If an adapter's gate depends on the token.
        """
        self._refuse_routed(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._refuse_routed(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _refuse_routed(self, adapter_names: list[str] | None) -> None:
        # Before the first weight is touched: a layer that refuses in the middle would leave the others merged.
        for name in adapter_names or self.active_adapters:
            config = self.peft_config.get(name)
            if isinstance(config, MoLoraConfig) and config.is_routed:
                raise cannot_merge(name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # Unloading puts the base layer back as it is. PEFT's default would copy the wrapper's weight over it, for
            # trained tokens a computed tensor and no parameter.
            setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT strips the name from the end of a key; ours stands right behind the container, however deep the
        # parameter lies below it.
        return re.sub(rf"(\.molora_[^.]+)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        return adapters_by_row(self, kwargs.pop("adapter_names", None), kwargs.get("num_beams"))


def _by_pattern(pattern: dict[str, Any], key: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(pattern.keys(), key), default)


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = resolve_quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"
