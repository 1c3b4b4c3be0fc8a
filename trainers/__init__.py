"""Trainers that add molora's routing losses and statistics. Imports as `molora.trainers`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from molora.trainers.callbacks import RoutingScheduleCallback
from molora.trainers.columns import TASK_IDS
from molora.trainers.control import RoutingControlCallback
from molora.trainers.mixin import RoutingLossMixin

if TYPE_CHECKING:
    from molora.trainers.distillation import DistillationMixin, DistillationOptions, DistillationTrainer, distil
    from molora.trainers.distillation_sft import DistillationSFTTrainer
    from molora.trainers.online import MoLoraGRPOTrainer, MoLoraRLOOTrainer
    from molora.trainers.preference import MoLoraDPOTrainer, MoLoraKTOTrainer, MoLoraRewardTrainer
    from molora.trainers.sft import MoLoraSFTTrainer
    from molora.trainers.transformers_trainer import MoLoraSeq2SeqTrainer, MoLoraTrainer

__all__ = [
    "TASK_IDS",
    "DistillationMixin",
    "DistillationOptions",
    "DistillationSFTTrainer",
    "DistillationTrainer",
    "MoLoraDPOTrainer",
    "MoLoraGRPOTrainer",
    "MoLoraKTOTrainer",
    "MoLoraRLOOTrainer",
    "MoLoraRewardTrainer",
    "MoLoraSFTTrainer",
    "MoLoraSeq2SeqTrainer",
    "MoLoraTrainer",
    "RoutingControlCallback",
    "RoutingLossMixin",
    "RoutingScheduleCallback",
    "distil",
]

_HOMES = {
    "DistillationMixin": "distillation",
    "DistillationOptions": "distillation",
    "DistillationSFTTrainer": "distillation_sft",
    "DistillationTrainer": "distillation",
    "MoLoraDPOTrainer": "preference",
    "MoLoraGRPOTrainer": "online",
    "MoLoraKTOTrainer": "preference",
    "MoLoraRLOOTrainer": "online",
    "MoLoraRewardTrainer": "preference",
    "MoLoraSFTTrainer": "sft",
    "MoLoraSeq2SeqTrainer": "transformers_trainer",
    "MoLoraTrainer": "transformers_trainer",
    "distil": "distillation",
}
"""Trainers by the module they are imported from when first asked for: each costs the import of its base."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
