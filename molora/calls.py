"""Calls of a whole model: a scope for its adapted layers, and PEFT's models taking routing inputs as keywords."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import peft.peft_model
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.decide import BASE_HIDDEN
from molora.modes import evaluating
from molora.routing.find import adapted_modules
from molora.routing.inputs import routing_inputs, scopes
from molora.routing.record import RECORDER
from molora.routing.scope import RoutingInputs, RoutingScope

_BACKBONE_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")
_KEYWORDS = tuple(RoutingInputs.__dataclass_fields__)
_LEFT_TO_TRAINERS = ("routing_losses", "routing_schedules", "balance_bias_rate")
"""Fields that do nothing by themselves: molora's trainers read them."""


class ModelScope(RoutingScope):
    """A scope that can ask the base model for its hidden states first.

    Attributes:
        wants_base: Whether an adapter's router reads the base model's last hidden states.
        hooks: Those by which the model tells of its calls.
        configs: Those of the model's adapters by name, as they are now.
        trainer_known: Whether a training was seen, and what it leaves out was said.
    """

    _LASTING = ("always", "spans_layers", "wants_base", "hooks", "configs")

    def __init__(self) -> None:
        super().__init__()
        self.wants_base = False
        self.hooks: list[RemovableHandle] = []
        self.configs: Mapping[str, Any] = {}
        self.trainer_known = False

    def attach(self, model: nn.Module) -> None:
        """Let a model tell of its calls, and an encoder-decoder of those of its encoder, which may run by itself."""
        self._attach(model, self.before_forward)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
            self._attach(model.get_encoder(), self.before_encoder)  # type: ignore[operator]  # a method in transformers

    def _attach(self, module: nn.Module, before: Callable[..., None]) -> None:
        self.hooks += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(self.after_forward, always_call=True),
        ]

    def detach(self) -> None:
        """Leave the model alone, as its adapted layers are gone."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins; if a router needs them, the base model's hidden states are computed."""
        super().before_forward(model, args, kwargs)
        training = model.training and torch.is_grad_enabled() and not self.silent
        if training and not self.trainer_known and not torch.compiler.is_compiling():  # which allows no warnings
            self._look_for_trainer(model)
        call = self.call
        if call is None or self.silent or not self.wants_base:
            return
        layers = [m for m in model.modules() if isinstance(m, MoLoraLayer) and not (m.disable_adapters or m.merged)]
        plans = [plan for layer in layers for plan in layer.molora_plan.values() if plan.router_input == "base"]
        kept = call.kept and BASE_HIDDEN in call.kept and all(plan.level == "sequence" for plan in plans)
        if plans and not call.decoded and not kept:
            call.shared[BASE_HIDDEN] = self._base_hidden(model, {"input_ids": args[0], **kwargs} if args else kwargs)
            if call.kept is not None:
                call.kept[BASE_HIDDEN] = True

    def _look_for_trainer(self, model: nn.Module) -> None:
        """Warn, once, if a training leaves out what only molora's trainers do; they are known by their recorder."""
        layer = next((layer for _, layer in adapted_modules(model)), None)
        if layer is None or layer.disable_adapters or not any(p.requires_grad for p in layer.parameters()):
            return
        if getattr(layer, RECORDER) is not None:
            self.trainer_known = True
            return
        configs = [self.configs[name] for name in layer.active_adapters if name in self.configs]
        left_out = [name for name in _LEFT_TO_TRAINERS if any(getattr(config, name, None) for config in configs)]
        if left_out:
            self.trainer_known = True
            warnings.warn(
                f"this training leaves out {' and '.join(left_out)} of the adapter, which molora's trainers follow "
                "and others do not know. Take one of molora.trainers, or put RoutingLossMixin before yours "
                "(docs/trainers.md); or empty these fields.",
                UserWarning,
                stacklevel=2,
            )

    def _base_hidden(self, model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """Last hidden states `[B, S, d]` of the model without any adapter."""
        inputs = {name: kwargs[name] for name in _BACKBONE_INPUTS if kwargs.get(name) is not None}
        backbone: Any = getattr(model, "base_model", model)
        self.silent = True
        try:
            with evaluating(model), torch.no_grad():
                decoder = {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}
                return backbone(**inputs, **decoder).last_hidden_state
        finally:
            self.silent = False


def needs_every_call(config: MoLoraConfig) -> bool:
    """Whether an adapter must know of each forward pass as a whole, even if it is given no inputs."""
    return (
        config.router_level == "sequence"
        or config.router_input == "base"
        or config.router_sharing == "model"
        or config.router == "recurrent"
        or config.capacity_factor is not None
    )


def scope_of(model: nn.Module, config: MoLoraConfig) -> ModelScope:
    """The scope of a model's adapted layers, made and hooked up with the first adapter.

    Args:
        model: The base model.
        config: The configuration of an adapter that is about to be put on it.
    """
    layers = [module for module in model.modules() if isinstance(module, MoLoraLayer)]
    scope = next((s for layer in layers if isinstance(s := layer.routing_scope, ModelScope)), None)
    if scope is None:
        scope = ModelScope()
        scope.attach(model)
    scope.always = scope.always or needs_every_call(config)
    scope.wants_base = scope.wants_base or config.router_input == "base"
    scope.spans_layers = scope.spans_layers or config.router_sharing == "model" or config.router == "recurrent"
    return scope


def take_routing_keywords() -> None:
    """Let the `forward` and `generate` of PEFT's models take routing inputs, for models with a molora adapter.

    PEFT's own signature has `task_ids`, and hands them to its Poly method only; there is no hook for another. Calls
    without these keywords, and models without molora, go straight through.
    """
    for kind in vars(peft.peft_model).values():
        if isinstance(kind, type) and issubclass(kind, PeftModel):
            for method in ("forward", "generate"):
                own = vars(kind).get(method)
                if own is not None and not hasattr(own, "takes_routing_keywords"):
                    setattr(kind, method, _taking_keywords(own, generating=method == "generate"))


def _taking_keywords(method: Callable[..., Any], generating: bool) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(config, MoLoraConfig) for config in self.peft_config.values()):
            return method(self, *args, **kwargs)
        given = {name: value for name in _KEYWORDS if (value := kwargs.pop(name, None)) is not None}
        prompts = generating and any(scope.always for scope in scopes(self))
        with routing_inputs(self, **given, generating=generating) if given or prompts else nullcontext():
            return method(self, *args, **kwargs)

    wrapped.takes_routing_keywords = True  # type: ignore[attr-defined]
    return wrapped
