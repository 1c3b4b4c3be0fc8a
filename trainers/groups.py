"""Routers learn at a rate of their own: parameter groups of an optimizer, by `router_lr_ratio` of the configs."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from molora.errors import MoloraError
from molora.trainers.callbacks import trained_adapters
from molora.trainers.sharding import plain_name

logger = logging.getLogger(__name__)

_ROUTING = re.compile(r"(?:^|\.)molora_(?:router|threshold|blend)\.([^.]+)(?:\.|$)")
_AT_ONE_RATE = ("lomo", "adalomo")
"""Optimizers that step in the backward pass, at one rate for all."""

Ratios = Mapping[str, float]
"""By adapter the learning rate of its routers, as a multiple of the others'."""


class RouterRatesMixin:
    """Groups what the optimizer steps, so that routers move at a rate of their own. Part of `RoutingLossMixin`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._grouped: Any = None
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Make the optimizer as the trainer does, with groups for the routers of adapters with a `router_lr_ratio`.

        Raises:
            MoloraError: If the optimizer cannot step some parameters at another rate.
        """
        trainer: Any = self
        before = trainer.optimizer
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into
        ratios = router_ratios(trainer.model)
        if not ratios:
            return optimizer
        if before is None:
            if trainer.args.optim in _AT_ONE_RATE and trainer.optimizer_cls_and_kwargs is None:
                raise _impossible(ratios, "LOMO steps in the backward pass, everything at one rate")
            model = args[0] if args else kwargs.get("model")
            split_groups(trainer.optimizer, trainer.model if model is None else model, ratios)
        elif not self._is_grouped(before):
            logger.warning(
                "the optimizer was given from outside, so router_lr_ratio of %s has no effect: its groups are left as "
                "they are. Leave out `optimizers`, or give it groups of your own.",
                " and ".join(map(repr, ratios)),
            )
        self._grouped = trainer.optimizer
        return trainer.optimizer

    def _is_grouped(self, optimizer: Any) -> bool:
        """Whether an optimizer was seen before; accelerate wraps it."""
        return self._grouped is not None and getattr(optimizer, "optimizer", optimizer) is self._grouped

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]  # the trainer's
        trainer: Any = self
        ratios = router_ratios(trainer.model)
        if ratios and self._grouped is None:  # DeepSpeed makes the optimizer that its own configuration names
            raise _impossible(ratios, "the optimizer is not made by the trainer; take it out of DeepSpeed's config")
        return prepared


def router_ratios(model: Any) -> dict[str, float]:
    """The active adapters of a model whose routers have a learning rate of their own, and its ratio to the others'."""
    ratios = {name: getattr(model.peft_config[name], "router_lr_ratio", 1.0) for name in trained_adapters(model)}
    return {name: ratio for name, ratio in ratios.items() if ratio != 1.0}


def split_groups(optimizer: Any, model: nn.Module, ratios: Ratios) -> None:
    """Move routers, threshold nets and blends into groups of their own, which differ in the learning rate only.

    Schedulers multiply the rate of each group, so ratios hold from the first step to the last. The optimizer's own
    groups stay, in their order and even if nothing is left in them; those of routers follow in the same order. So
    the same configuration gives the same groups, and a saved state fits.

    Args:
        optimizer: A new optimizer, without state.
        model: The model whose parameters it steps; it may be wrapped.
        ratios: By adapter.

    Raises:
        MoloraError: If the optimizer has no groups with a rate, or not of these parameters.
    """
    wanted = _ratio_of_parameters(model, ratios)
    groups, found = list(getattr(optimizer, "param_groups", [])), 0
    for group in groups:
        by_ratio: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_ratio.setdefault(wanted.get(parameter, 1.0), []).append(parameter)
        group["params"] = by_ratio.pop(1.0, [])
        for ratio, parameters in sorted(by_ratio.items()):
            if group.get("lr") is None:
                raise _impossible(ratios, f"{type(optimizer).__name__} finds its learning rate by itself")
            found += len(parameters)
            optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * ratio})
    if found < len(wanted):
        raise _impossible(ratios, f"{type(optimizer).__name__} does not keep them in its parameter groups")


def _ratio_of_parameters(model: nn.Module, ratios: Ratios) -> dict[nn.Parameter, float]:
    """The trained parameters of routers, with what multiplies their learning rate."""
    wanted = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        # FSDP 1 may have made one vector of several parameters.
        inside = [name.rpartition(".")[0] + "." + own for own in getattr(parameter, "_fqns", ())] or [name]
        found = {_ratio_of_name(own, ratios) for own in inside}
        if len(found) > 1:
            raise _impossible(ratios, "FSDP 1 has made one parameter of routers and others; set fsdp_use_orig_params")
        ratio = found.pop()
        if ratio != 1.0:
            wanted[parameter] = ratio
    return wanted


def _ratio_of_name(name: str, ratios: Ratios) -> float:
    match = _ROUTING.search(plain_name(name))
    return ratios.get(match[1], 1.0) if match else 1.0


def _impossible(ratios: Ratios, reason: str) -> MoloraError:
    of = ", ".join(f"{ratio:g} of adapter {name!r}" for name, ratio in ratios.items())
    return MoloraError(
        f"router_lr_ratio={of} cannot be kept: {reason}. Use another optimizer, such as optim='adamw_torch', or leave "
        "router_lr_ratio at 1."
    )
