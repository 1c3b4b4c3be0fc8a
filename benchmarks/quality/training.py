"""Train an adapter on a list of batches, in their order, with the schedule that all arms share."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from benchmarks.quality.data import Batch
from molora import MoLoraConfig
from molora.base import load_base
from molora.data import IGNORED, TaskCollator
from molora.errors import MoloraError
from molora.trainers.mixin import RoutingLossMixin

WARM_UP = 0.06
LAST_RATE = 0.05
"""The learning rate ends at this share of its peak."""


@dataclass(frozen=True)
class Place:
    """Where and in which precision a model runs.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: Of the base model. Adapters stay in fp32; products run under autocast if the base is in 16 bits.
        pad: Token that fills rows up.
    """

    device: str
    dtype: str
    pad: int

    @property
    def half(self) -> bool:
        """Whether the base is in 16 bits."""
        return self.dtype == "bfloat16"

    def precision(self) -> AbstractContextManager[Any]:
        """A block with the precision of training, as the trainer opens it."""
        return torch.autocast(self.device, torch.bfloat16) if self.half else nullcontext()

    @property
    def collator(self) -> TaskCollator:
        """Pads at the left, so that the answers of a batch end together and few logits are needed."""
        return TaskCollator(self.pad, padding_side="left")

    def batch(self, items: Batch, experts: int) -> dict[str, Tensor]:
        """Items as a batch on the device."""
        collated = self.collator([item.columns(experts) for item in items])
        return {name: value.to(self.device) for name, value in collated.items()}


def load_frozen(name: str, place: Place) -> Any:
    """The base model, frozen and in its place."""
    # Not sdpa: on a GPU it once left NaN in rows that begin with padding, for a plain LoRA too.
    base: Any = load_base(name, dtype=getattr(torch, place.dtype), attn_implementation="eager")[0]
    return base.requires_grad_(False).to(device=place.device)


def answer_losses(model: nn.Module, batch: Mapping[str, Tensor], whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run a model and compare it with the answers.

    Args:
        model: A causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, `[B, S]`, padded at the left.
        whole: Compute all logits, for whoever else reads them.

    Returns:
        Negative log-likelihood of each of the last K tokens `[B, K]`, zero off the answers; which of them belong to an
        answer, boolean; and which of those the model would have chosen itself.
    """
    labels, mask = batch["labels"], batch["attention_mask"]
    known = labels != IGNORED
    width = labels.shape[1] - 1 if whole else int(known.sum(dim=1).max().item())
    fields = inspect.signature(_base_of(model).forward).parameters
    options = {"logits_to_keep": width + 1} if "logits_to_keep" in fields and not whole else {}
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False, **options
    ).logits[:, -width - 1 : -1]
    targets, known = labels[:, -width:], known[:, -width:]
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    return losses, known, (logits.detach().argmax(dim=-1) == targets) & known


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class AnswerTrainer(Trainer):
    """Minimises the mean loss of a batch's answer tokens, and keeps what each row's answer cost before the step.

    A row of the dataset is a whole batch, as batches are fixed beforehand and need not be equally large.
    """

    whole_logits = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # a list has a length

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the batch's answer tokens."""
        losses, known, _ = answer_losses(model, inputs, self.whole_logits)
        # Tensors stay where they are: reading a number would wait for the device.
        self.seen.setdefault(self.state.global_step, (losses.detach().sum(dim=1), known.sum(dim=1)))
        return losses.sum() / known.sum()


class BenchTrainer(RoutingLossMixin, AnswerTrainer):
    """The same with molora's routing losses, controllers and schedules."""


def adapted(base: nn.Module, fields: Mapping[str, Any], seed: int) -> PeftModel:
    """Put a fresh adapter on a copy of the base model; the seed draws it.

    Args:
        base: Left as it is.
        fields: Of `MoLoraConfig`; `preset` names what they start from.
        seed: Seed of everything random that follows.
    """
    set_seed(seed)
    with _quiet():
        return get_peft_model(copy.deepcopy(base), config_of(fields))


def config_of(fields: Mapping[str, Any]) -> MoLoraConfig:
    """The config of an arm: a preset, if there is one, and what is different."""
    own = {name: value for name, value in fields.items() if name != "preset"}
    if "preset" in fields:
        return MoLoraConfig.from_preset(fields["preset"], **own)
    return MoLoraConfig(**own)


def train(
    model: PeftModel, batches: Sequence[Batch], place: Place, *, learning_rate: float, seed: int, experts: int = 0
) -> list[list[tuple[int, float, int]]]:
    """Train an adapted model on batches, one step each.

    Args:
        model: Left in evaluation mode.
        batches: The stream.
        place: Where to run.
        learning_rate: Its peak.
        seed: Of dropout and noise.
        experts: Experts of an arm whose rows name their own expert by the task; else 0.

    Returns:
        For each step the rows of its batch: task, summed loss of the answer before the step, and its tokens.
    """
    rows = [[item.columns(experts) for item in batch] for batch in batches]
    losses = getattr(model.peft_config[model.active_adapter], "routing_losses", {})
    with tempfile.TemporaryDirectory() as folder, _quiet():
        arguments = _arguments(folder, len(batches), place, learning_rate, seed)
        trainer = BenchTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=lambda given: place.collator(given[0])
        )
        trainer.whole_logits = "consistency" in losses  # which compares the outputs of two passes
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    steps = [
        [
            (item.task, nll, tokens)
            for item, nll, tokens in zip(batch, *map(Tensor.tolist, trainer.seen[at]), strict=True)
        ]
        for at, batch in enumerate(batches)
    ]
    for at, step in enumerate(steps):
        if not all(math.isfinite(nll) for _, nll, _ in step):
            raise MoloraError(f"the loss of step {at + 1} is not finite, so the run says nothing.")
    return steps


def _arguments(folder: str, steps: int, place: Place, learning_rate: float, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": LAST_RATE},
        warmup_steps=math.ceil(WARM_UP * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=place.half,
        use_cpu=place.device == "cpu",
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without warnings, which every one of many runs would repeat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def online_loss(steps: Sequence[Sequence[tuple[int, float, int]]], tasks: int) -> float | None:
    """Mean over tasks of the loss of answers in the last half of training, each before the step that learned it.

    None if a task had no row there.
    """
    nll, tokens = [0.0] * tasks, [0] * tasks
    for step in steps[len(steps) // 2 :]:
        for task, loss, count in step:
            nll[task] += loss
            tokens[task] += count
    trained = {task for step in steps for task, _, _ in step}
    if any(not tokens[task] for task in trained):
        return None
    return sum(nll[task] / tokens[task] for task in trained) / len(trained)
