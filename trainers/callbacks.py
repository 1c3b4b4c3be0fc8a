"""What changes between steps: balancing biases, and routing choices that follow a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from transformers import TrainerCallback

from molora.errors import MoloraError
from molora.routing.balance import balanced_bias
from molora.routing.record import StackedRouting
from molora.routing.schedules import schedule_problems, scheduled_value
from molora.routing.statistics import selection_counts


def trained_adapters(model: Any) -> list[str]:
    """Names of the active adapters that have a config."""
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active  # a method on transformers models, a property on PEFT's
    return [name for name in names if name in getattr(model, "peft_config", {})]


class BalanceBiasCallback(TrainerCallback):
    """Moves the balancing biases after each optimizer step, for adapters whose config has a `balance_bias_rate`.

    `RoutingLossMixin` installs it and hands it the decisions of every micro-batch. All processes take the same step,
    from the counts of all of them. A forward pass never changes a bias: gradient checkpointing runs it twice.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], Tensor] = {}

    def count(self, adapter: str, stacks: Iterable[StackedRouting]) -> None:
        """Add the selections of one micro-batch."""
        for stack in stacks:
            for layer, counts in zip(stack.layers, selection_counts(stack), strict=True):
                before = self._counts.get((layer, adapter))
                self._counts[layer, adapter] = counts if before is None else before + counts

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move every bias by one step, and count anew."""
        counted, self._counts = self._counts, {}
        biases = list(_biases(kwargs["model"]))
        if not biases:
            return
        # One reduction of everything, as processes may have run different layers.
        mine = [counted.get(key, torch.zeros_like(bias)).to(bias.device, torch.float32) for key, bias, _ in biases]
        for (key, bias, _), counts in zip(biases, mine, strict=True):
            if bias.shape != counts.shape:
                raise MoloraError(
                    f"the balancing bias of {key[0]!r} has shape {tuple(bias.shape)} for {len(counts)} experts; a "
                    "sharded one cannot be moved. Train with DDP, or without `balance_bias_rate`."
                )
        everyones = reduce(torch.cat(mine), reduction="sum")
        shares = everyones.split([len(counts) for counts in mine])
        for (_, bias, rate), counts in zip(biases, shares, strict=True):
            bias.copy_(balanced_bias(bias, counts, rate))


def _biases(model: Any) -> Iterator[tuple[tuple[str, str], Tensor, float]]:
    """Layer and adapter, bias, and rate, in the order of the model."""
    for adapter in trained_adapters(model):
        rate = getattr(model.peft_config[adapter], "balance_bias_rate", None)
        if rate is None:
            continue
        for name, module in model.named_modules():
            held = getattr(module, "molora_bias", None)
            if held is not None and adapter in held:
                yield (name, adapter), held[adapter].weight, rate


class RoutingScheduleCallback(TrainerCallback):
    """Changes routing choices over the course of training.

    `RoutingLossMixin` installs one that reads `routing_schedules` of each active adapter's config; add your own only
    to a trainer without the mixin. The values depend on the step alone, so a resumed training continues them. Each
    is written into the adapter's config too: a saved adapter routes as it was last trained.

    Args:
        schedules: Field to schedule, e.g. `{"top_k": {"start": 8, "end": 2, "shape": "linear", "until": 0.5}}`, for
            every active adapter; by default what their configs say.

    Raises:
        MoloraError: If a schedule is impossible.
    """

    def __init__(self, schedules: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        problems = list(schedule_problems({} if schedules is None else schedules))
        if problems:
            raise MoloraError("impossible schedules:" + "".join(f"\n  - {problem}" for problem in problems))
        self.schedules = schedules

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set what holds for the step that begins."""
        model = kwargs["model"]
        for adapter in trained_adapters(model):
            config = model.peft_config[adapter]
            schedules = getattr(config, "routing_schedules", None) if self.schedules is None else self.schedules
            if schedules:
                values = {
                    field: scheduled_value(field, schedule, state.global_step, state.max_steps)
                    for field, schedule in schedules.items()
                }
                set_routing(model, adapter, values)


def set_routing(model: Any, adapter: str, values: Mapping[str, Any]) -> None:
    """Change routing choices of an adapter, in its layers and in its config.

    Args:
        model: The adapted model.
        adapter: Name of the adapter.
        values: Fields that `RoutingSpec` and `MoLoraConfig` share.
    """
    for module in model.modules():
        specs = getattr(module, "molora_spec", {})
        if adapter in specs:
            specs[adapter] = replace(specs[adapter], **values)
    for field, value in values.items():
        setattr(model.peft_config[adapter], field, value)
