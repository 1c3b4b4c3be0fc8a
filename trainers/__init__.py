"""Trainers that add molora's routing losses and statistics. Imports as `molora.trainers`."""

from molora.trainers.callbacks import BalanceBiasCallback, RoutingScheduleCallback
from molora.trainers.columns import TASK_IDS
from molora.trainers.mixin import RoutingLossMixin
from molora.trainers.sft import MoLoraSFTTrainer
from molora.trainers.transformers_trainer import MoLoraTrainer

__all__ = [
    "TASK_IDS",
    "BalanceBiasCallback",
    "MoLoraSFTTrainer",
    "MoLoraTrainer",
    "RoutingLossMixin",
    "RoutingScheduleCallback",
]
