"""Trainers that add molora's routing losses and statistics. Imports as `molora.trainers`."""

from molora.trainers.mixin import TASK_IDS, RoutingLossMixin
from molora.trainers.sft import MoLoraSFTTrainer
from molora.trainers.transformers_trainer import MoLoraTrainer

__all__ = ["TASK_IDS", "MoLoraSFTTrainer", "MoLoraTrainer", "RoutingLossMixin"]
