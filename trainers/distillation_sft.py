"""TRL's supervised fine-tuning trainer as a trainer of students."""

from __future__ import annotations

from trl import SFTTrainer

from molora.trainers.distillation import DistillationMixin


class DistillationSFTTrainer(DistillationMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains a student on what a teacher does; see `DistillationMixin`."""
