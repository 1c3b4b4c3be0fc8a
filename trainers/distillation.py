"""`DistillationMixin`: any transformers or TRL trainer trains a student to do what a teacher does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import reduce
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from molora.errors import MoloraError
from molora.trainers.column_mixin import RoutingColumnsMixin
from molora.trainers.distillation_loss import (
    DistillationOptions,
    Predictions,
    head_of,
    makes_logits,
    same,
    sum_of_hidden_errors,
    sums_of_predictions,
    supervised,
)
from molora.trainers.distillation_pair import (
    Pass,
    TeacherColumns,
    causal_model,
    check_hidden,
    check_pair,
    evaluating,
    move_to,
    run_batch,
)
from molora.trainers.mixin import RoutingLossMixin

__all__ = ["DistillationMixin", "DistillationOptions", "DistillationTrainer", "distil"]

LOG_PREFIX = "distillation/"

_PARTS = ("kl", "hidden", "task")


class DistillationMixin(RoutingColumnsMixin):
    """Put before a trainer: `class MyTrainer(DistillationMixin, SFTTrainer)`.

    The trainer's own loss is replaced by that of `DistillationOptions`. The teacher runs in evaluation mode without
    gradients, and nothing of it is trained or saved. It may share base weights with the student. Columns `task_ids`,
    `expert_scores` and `prompt_mask` reach the routing of both. The parts are logged under `distillation/`.

    If the student is itself routed and has routing losses: `class MyTrainer(RoutingLossMixin, DistillationMixin, …)`.

    Args:
        *args: Those of the trainer.
        teacher: A causal language model with the student's vocabulary, adapted or not.
        distillation: What to match; by default only the distributions.
        **kwargs: Those of the trainer.

    Raises:
        MoloraError: If teacher and student do not go together, or the trainer is given a loss of its own.
    """

    loss_is_scaled_for_ga = True  # by the tokens of the whole step

    def __init__(
        self, *args: Any, teacher: nn.Module, distillation: DistillationOptions | None = None, **kwargs: Any
    ) -> None:
        order = [kind for kind in type(self).__mro__ if kind in (DistillationMixin, RoutingLossMixin)]
        if order == [DistillationMixin, RoutingLossMixin]:
            raise MoloraError(
                "the routing losses would be lost: put RoutingLossMixin before DistillationMixin, as in "
                "`class MyTrainer(RoutingLossMixin, DistillationMixin, SFTTrainer)`."
            )
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
            raise MoloraError(
                "compute_loss_func and label_smoothing_factor change a loss that distillation replaces; leave them "
                "out, and set task_weight for the cross-entropy of the labels."
            )
        check_pair(trainer.model, teacher)
        move_to(teacher, trainer.args.device)
        self.teacher = teacher
        self.distillation = distillation or DistillationOptions()
        self._teacher_columns = TeacherColumns(teacher)
        self._tokens_of_step: Tensor | None = None
        self._whole: bool | None = None
        self._sums: dict[str, Tensor] = {}

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Fetch the batches of a step, and count the tokens that its loss is the mean over."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]  # the trainer
        trainer: Any = self
        if batches:
            counts = [supervised(batch)[0].sum() for batch in batches]
            total = torch.stack(counts).sum().to(trainer.args.device, torch.float32)
            # Gradients are averaged over processes, so each divides by its share of all tokens.
            self._tokens_of_step = reduce(total, reduction="mean")
        return batches, items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compare student and teacher on a batch; in training also remember the parts for the log.

        Raises:
            MoloraError: If a part needs labels or hidden states that are not there.
        """
        trainer: Any = self
        if not isinstance(self, RoutingLossMixin):
            self._take(inputs, new=inputs is not self._prepared)
        mask, labels = supervised(inputs)
        if labels is None and self.distillation.task_weight:
            raise MoloraError("task_weight needs labels, and the batch has none; add them, or set it to 0.")
        models = [causal_model(trainer.accelerator.unwrap_model(side)) for side in (model, self.teacher)]
        hidden = bool(self.distillation.hidden_weight)
        if self._whole is None:
            self._whole = self._needs_logits(model, models, inputs)
        with self._given(inputs):
            student = run_batch(model, models[0], inputs, whole=self._whole or return_outputs, hidden=hidden)
        teacher = self._run_teacher(models[1], inputs, whole=self._whole, hidden=hidden)
        heads = None if self._whole else [head_of(one) for one in models]
        sums = self._compare(student, teacher, heads, mask, labels)
        tokens, training = mask.sum(), trainer.model.training
        if training:
            self._remember(sums, tokens)
        counted = self._tokens_of_step if training and self._tokens_of_step is not None else tokens
        weights = {"kl": 1.0, "hidden": self.distillation.hidden_weight, "task": self.distillation.task_weight}
        loss = sum(weights[part] * value for part, value in sums.items()) / counted.clamp(min=1)
        return (loss, student.outputs) if return_outputs else loss

    def _needs_logits(self, model: Any, models: list[Any], inputs: Any) -> bool:
        """Whether only the models themselves can tell their logits, as a head is not all that makes them.

        Both are run on the first batch once more, without gradients: nothing records it or is drawn for it.
        """
        heads = [head_of(one) for one in models]
        if None in heads:
            return True
        with torch.no_grad(), evaluating(model), self._given(inputs):
            student = run_batch(model, models[0], inputs, whole=False, hidden=False)
        teacher = self._run_teacher(models[1], inputs, whole=False, hidden=False)
        with torch.no_grad():
            return not all(
                head is not None and makes_logits(head, one.backbone.last_hidden_state, one.outputs.logits)
                for head, one in zip(heads, (student, teacher), strict=True)
            )

    def _run_teacher(self, causal: Any, inputs: Any, *, whole: bool, hidden: bool) -> Pass:
        with torch.no_grad(), evaluating(self.teacher), self._teacher_columns.given(self._columns, inputs):
            return run_batch(self.teacher, causal, inputs, whole=whole, hidden=hidden)

    def _compare(
        self, student: Pass, teacher: Pass, heads: list[Any] | None, mask: Tensor, labels: Tensor | None
    ) -> dict[str, Tensor]:
        """The sums of the parts over the tokens of a batch; from whole logits if there are no heads."""
        options = self.distillation
        sides = [
            Predictions(one.outputs.logits[mask], same)
            if heads is None
            else Predictions(one.backbone.last_hidden_state[mask], head)
            for one, head in zip((student, teacher), heads or (same, same), strict=True)
        ]
        targets = labels[mask] if labels is not None and options.task_weight else None
        kl, task = sums_of_predictions(*sides, targets, options.temperature, options.chunk_tokens)
        sums = {"kl": kl}
        if options.hidden_weight:
            own, other = student.backbone.hidden_states, teacher.backbone.hidden_states
            check_hidden(own, other)
            layers = options.layers(len(own) - 1)
            sums["hidden"] = sum_of_hidden_errors([own[i][mask] for i in layers], [other[i][mask] for i in layers])
        return sums | ({"task": task} if options.task_weight else {})

    def _remember(self, sums: Mapping[str, Tensor], tokens: Tensor) -> None:
        for part, value in sums.items():
            entry = torch.stack([value.detach().float(), tokens.float()])
            self._sums[part] = self._sums.get(part, 0) + entry

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the trainer does, with the mean of each part over the tokens since the last log."""
        if "loss" in logs and self._sums:
            parts = [part for part in _PARTS if part in self._sums]  # the same in every process
            summed = reduce(torch.stack([self._sums[part] for part in parts]), reduction="sum").tolist()
            self._sums.clear()
            logs = {**logs, **{LOG_PREFIX + part: s / max(n, 1) for part, (s, n) in zip(parts, summed, strict=True)}}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compare on a batch without training, whether it has labels or not."""
        trainer: Any = self
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), outputs.logits, inputs.get("labels")


class DistillationTrainer(DistillationMixin, Trainer):
    """`transformers.Trainer` that trains a student on what a teacher does; see `DistillationMixin`."""


def distil(
    student: PeftModel,
    teacher: nn.Module,
    dataset: Any,
    collator: Callable[[list[Any]], dict[str, Tensor]],
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
    distillation: DistillationOptions | None = None,
    **arguments: Any,
) -> None:
    """Train what is trainable of a student, in place, to do what a teacher does. Leaves no files.

    Args:
        student: An adapted model; its LoRA is trained. Left in the mode it was in.
        teacher: The model to imitate; may share base weights with the student.
        dataset: Tokenised rows: `input_ids`, and `labels` if only some tokens count; routing columns if the teacher
            reads them.
        collator: Makes a batch of rows.
        steps: Optimizer steps.
        learning_rate: At the start; falls to zero along a cosine.
        batch_size: Rows of a step.
        seed: Decides the order of the rows.
        distillation: What to match.
        **arguments: Further fields of `TrainingArguments`.

    Raises:
        MoloraError: If nothing of the student is trainable, or it does not go together with the teacher.
    """
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise MoloraError("nothing of the student is trainable; load its adapter with is_trainable=True.")
    was_training = student.training
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": batch_size,
            "seed": seed,
            "use_cpu": not torch.accelerator.is_available(),
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **arguments,
        }
        trainer = DistillationTrainer(
            model=student,
            args=TrainingArguments(**settings),
            train_dataset=dataset,
            data_collator=collator,
            teacher=teacher,
            distillation=distillation,
        )
        trainer.remove_callback(PrinterCallback)  # a library does not print
        try:
            trainer.train()
        finally:
            student.train(was_training)
