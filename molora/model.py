"""`MoLoraModel`: puts molora layers into a model, the way every PEFT tuner does."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, get_quantization_kwargs
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora import lifecycle
from molora.bank import MoLoraLayer
from molora.block import MoLoraBlock
from molora.calls import scope_of
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.imported import LORAS
from molora.layer import MoLoraLinear
from molora.loading import check_base, load_experts
from molora.placement import Placement, restrict_layers
from molora.plain.stand_in import HowToMerge, check_tied, stand_ins
from molora.plan import ModulePlan, plan_module
from molora.quantization import check_merge, keep_packing
from molora.row_adapters import adapters_by_row
from molora.targets import adapted_sizes, check_level, check_nesting, check_targets, is_linear, text_config


class MoLoraModel(BaseTuner):
    """A model whose matched linear layers carry mixtures of LoRA experts.

    Made by `get_peft_model(model, MoLoraConfig(...))`; everything a user calls is PEFT's.

    Args:
        model: The base model.
        peft_config: Configuration, or one per adapter name.
        adapter_name: Name of the first adapter.

    Raises:
        TargetModulesError: If `target_modules` names something the model does not have, or that is no linear layer.
        QuantizationError: If bitsandbytes packed the model's weights for inference only.
    """

    prefix = "molora_"
    tuner_layer_cls = MoLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: MoLoraConfig, model: nn.Module) -> None:
        # The last hook before modules are replaced: nothing is half-done if the targets turn out wrong.
        loras = getattr(peft_config, LORAS, None)
        if loras is not None:
            check_base(model, loras)
        everywhere = str(peft_config.target_modules).lower() == "all-linear"
        check_targets(peft_config, model)
        _maybe_include_all_linear_layers(peft_config, model)
        sizes = text_config(model)
        num_layers = getattr(sizes, "num_hidden_layers", None)
        restrict_layers(peft_config, num_layers, everywhere)
        self._placement = Placement(peft_config, num_layers, getattr(sizes, "hidden_size", None))
        targets = [
            (key, module)
            for key, module in model.named_modules()
            if key and self._check_target_module_exists(peft_config, key)
        ]
        check_nesting([key for key, _ in targets], _blocks(model))
        linears = [key.removesuffix(".base_layer") for key, module in model.named_modules() if is_linear(module)]
        self._placement.expect(targets, linears)
        keep_packing(model)
        self._scope = scope_of(model, peft_config)
        self._scope.configs = self.peft_config

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
        place = self._placement
        check_level(peft_config, self.model, current_key)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        kind = place.position(current_key, target)
        plan = plan_module(peft_config, current_key, place.num_layers, place.is_plain(current_key), kind)
        size_in, size_out = adapted_sizes(peft_config, base, current_key, place.hidden_size)
        group = place.group(current_key, size_out if plan.after else size_in)
        pool = place.pools.get(place.kind(current_key, target))
        reads = place.input_of(current_key)
        if isinstance(target, MoLoraLayer):
            target.update_layer(adapter_name, peft_config, plan, group, pool, peft_config.inference_mode, reads)
            layer = target
        else:
            layer = self._new_layer(
                peft_config, adapter_name, target, plan, current_key, group=group, pool=pool, reads=reads
            )
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        layer.routing_scope = self._scope
        if adapter_name in layer.molora_pool:
            place.pools[place.kind(current_key, target)] = layer.molora_pool[adapter_name]
        if place.previous is not None:
            layer.molora_before[adapter_name] = place.previous
        place.previous = layer

    def _new_layer(
        self,
        config: MoLoraConfig,
        adapter_name: str,
        target: nn.Module,
        plan: ModulePlan,
        key: str,
        **shared: Any,
    ) -> MoLoraLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if config.expert_scope == "block":
            return MoLoraBlock(
                target, adapter_name, config, plan, self._placement.hidden_size, module_key=key, **shared
            )
        is_conv1d = isinstance(base, Conv1D)
        if isinstance(base, nn.Linear | Conv1D) and config.fan_in_fan_out != is_conv1d:
            if config.fan_in_fan_out:
                sentence = f"{key} is a {type(base).__name__}, so fan_in_fan_out is False; leave it out."
                warnings.warn(sentence, stacklevel=2)
            config.fan_in_fan_out = is_conv1d
        quantization = get_quantization_kwargs(self.model)
        return MoLoraLinear(target, adapter_name, config, plan, module_key=key, **shared, **quantization)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter on the model; one that was made from trained adapters starts with their weights."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        loras = getattr(config, LORAS, None)
        if loras is not None:
            load_experts(model, adapter_name, config, loras)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, with its hooks: they tell the adapted layers that a call begins."""
        return self.model(*args, **kwargs)

    def add_experts(
        self, n: int, adapter_name: str = "default", freeze_existing: bool = True, r: int | None = None
    ) -> None:
        """Append fresh experts to every adapted module; see `molora.lifecycle.add_experts`."""
        lifecycle.add_experts(self, n, adapter_name, freeze_existing, r)

    def drop_experts(self, experts: Iterable[int], adapter_name: str = "default") -> None:
        """Remove experts from every adapted module; see `molora.lifecycle.drop_experts`."""
        lifecycle.drop_experts(self, experts, adapter_name)

    def freeze_router(self, adapter_name: str = "default", frozen: bool = True) -> None:
        """Stop training the routers, or go on with it; see `molora.lifecycle.freeze_router`."""
        lifecycle.freeze_router(self, adapter_name, frozen)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, **how: Unpack[HowToMerge]
    ) -> None:
        """Merge adapters into the base weights, all of them or, if one cannot be merged, none.

        Exact where mixing weights are fixed: by themselves, or by the `task`, `expert_scores` or `prompt` given.

        Args:
            adapter_names: Which; the active ones by default.
            safe_merge: Check merged weights for NaN and infinity.
            **how: What fixes the mixing weights, or how to approximate; see `molora.plain.stand_in.HowToMerge`.

        Raises:
            MergeError: If an adapter's gate depends on more than what is given.
        """
        with self._standing_in(adapter_names, how):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **how: Unpack[HowToMerge],
    ) -> Any:
        """Merge adapters as `merge_adapter` does, and return the base model without them."""
        with self._standing_in(adapter_names, how):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._scope.detach()
        return model

    @contextmanager
    def _standing_in(self, adapter_names: list[str] | None, how: HowToMerge) -> Iterator[None]:
        """Choose for each adapter the plain LoRA that is merged for it, before the first weight is touched.

        A layer that refuses in the middle would leave the others merged.
        """
        names = list(adapter_names or self.active_adapters)
        if unknown := [name for name in names if name not in self.peft_config]:
            raise MoloraError(f"there is no adapter {unknown[0]!r}; there are {', '.join(self.peft_config)}.")
        check_tied(self.model, names)
        layers = [m for m in self.model.modules() if isinstance(m, MoLoraLayer) and any(map(m.has_adapter, names))]
        chosen = {name: stand_ins(self, name, **how) for name in names}
        for layer in layers:
            check_merge(layer.quantization_backend)
        for layer in layers:
            for name in names:
                if layer.module_key in chosen[name] and name not in layer.merged_adapters:
                    layer.molora_stand_in[name] = chosen[name][layer.module_key]
        merged = [(layer, len(layer.merged_adapters)) for layer in layers if hasattr(layer, "unmerge_to")]
        try:
            yield
        except BaseException:
            for layer, before in merged:
                layer.unmerge_to(before)
            raise
        finally:
            for layer in layers:
                for name in names:
                    if name not in layer.merged_adapters:
                        layer.molora_stand_in.pop(name, None)

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


def _blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, MoLoraBlock)]
