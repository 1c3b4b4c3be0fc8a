"""Routing choices that follow a schedule over the training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import TrainerCallback

from molora.errors import MoloraError
from molora.routing.find import adapted_modules
from molora.routing.schedules import schedule_problems, scheduled_value


def trained_adapters(model: Any) -> list[str]:
    """Names of the active adapters that have a config."""
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active  # a method on transformers models, a property on PEFT's
    return [name for name in names if name in getattr(model, "peft_config", {})]


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


def restore_choices(model: Any, checkpoint: str) -> None:
    """Take up the scheduled choices that the adapters in a checkpoint were saved with.

    Args:
        model: The adapted model.
        checkpoint: Folder of a checkpoint; adapters other than `default` lie in folders of their names.
    """
    for adapter in trained_adapters(model):
        fields = getattr(model.peft_config[adapter], "routing_schedules", {})
        file = Path(checkpoint) / ("" if adapter == "default" else adapter) / CONFIG_NAME
        if fields and file.is_file():
            saved = json.loads(file.read_text(encoding="utf-8"))
            set_routing(model, adapter, {field: saved[field] for field in fields})


def set_routing(model: Any, adapter: str, values: Mapping[str, Any]) -> None:
    """Change routing choices of an adapter, in its layers and in its config.

    Args:
        model: The adapted model.
        adapter: Name of the adapter.
        values: Fields that `RoutingSpec` and `MoLoraConfig` share.
    """
    for _, module in adapted_modules(model):
        specs = module.molora_spec
        if adapter in specs:
            specs[adapter] = replace(specs[adapter], **values)
    for field, value in values.items():
        setattr(model.peft_config[adapter], field, value)
