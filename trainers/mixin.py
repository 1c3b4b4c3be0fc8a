"""`RoutingLossMixin`: adds routing losses and routing statistics to any transformers or TRL trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from molora.losses import total_loss
from molora.routing.record import RoutingRecord, record_routing, stack_records
from molora.routing.statistics import RoutingTally, tally
from molora.trainers.callbacks import BalanceBiasCallback, RoutingScheduleCallback, trained_adapters
from molora.trainers.column_mixin import RoutingColumnsMixin

LOG_PREFIX = "molora/"


class RoutingLossMixin(RoutingColumnsMixin):
    """Put first among a trainer's bases: `class MyTrainer(RoutingLossMixin, SFTTrainer)`.

    The losses are those in the `routing_losses` of each active adapter's config. They are added in `compute_loss`, the
    one place every trainer has where the forward passes have run and the backward pass has not, and only in training:
    `eval_loss` stays the task's. Statistics are logged beside the loss under `molora/`.

    Balancing biases and `routing_schedules` of the configs are kept up by callbacks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._balance = BalanceBiasCallback()
        trainer: Any = self
        trainer.add_callback(self._balance)
        trainer.add_callback(RoutingScheduleCallback())
        self._routing_tallies: dict[str, RoutingTally] = {}
        self._routing_values: dict[str, list[Tensor]] = defaultdict(list)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the routing losses to the trainer's own loss; in evaluation, change nothing.

        Raises:
            RuntimeError: If losses are configured and no layer recorded a decision that carries a gradient.
        """
        trainer: Any = super()
        self._take(inputs)
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        with ExitStack() as block:
            block.enter_context(self._given(inputs))
            training = self.model.training and torch.is_grad_enabled()
            records: list[RoutingRecord] = []
            if training:
                records = block.enter_context(record_routing(self.model, with_grad_only=True, labels=labels))
            result = trainer.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not training:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._routing_loss(records) / self._accumulation_divisor(num_items_in_batch)
        return (loss, *outputs) if return_outputs else loss

    def _routing_loss(self, records: list[RoutingRecord]) -> Tensor | float:
        """Sum the adapters' losses over one micro-batch, and remember their values for the log."""
        by_adapter: dict[str, list[RoutingRecord]] = defaultdict(list)
        for record in records:
            by_adapter[record.adapter].append(record)
        total: Tensor | float = 0.0
        for adapter in trained_adapters(self.model):
            config = self.model.peft_config[adapter]
            losses = getattr(config, "routing_losses", {})
            balances = getattr(config, "balance_bias_rate", None) is not None
            if adapter in by_adapter:
                stacks = stack_records(by_adapter[adapter])
                value, values = total_loss(stacks, losses, self.task_ids)
                total = total + value
                self._remember(self._log_name(adapter, by_adapter), tally(stacks), values)
                if balances:
                    self._balance.count(adapter, stacks)
            elif losses or balances:
                what = "routing_losses" if losses else "balance_bias_rate"
                raise RuntimeError(
                    f"{what} of adapter {adapter!r} found no routing decision that carries a gradient. With gradient "
                    'checkpointing set gradient_checkpointing_kwargs={"use_reentrant": False}; otherwise the loss was '
                    "computed without calling the adapted model."
                )
        return total

    def _log_name(self, adapter: str, by_adapter: dict[str, list[RoutingRecord]]) -> str:
        return LOG_PREFIX if len(by_adapter) == 1 else f"{LOG_PREFIX}{adapter}/"

    def _remember(self, prefix: str, counted: RoutingTally | None, values: dict[str, Tensor]) -> None:
        if counted is not None:
            before = self._routing_tallies.get(prefix)
            self._routing_tallies[prefix] = counted if before is None else before + counted
        for name, value in values.items():
            self._routing_values[prefix + name].append(value)

    def _accumulation_divisor(self, num_items_in_batch: Any) -> int:
        """What a per-micro-batch mean must be divided by so that accumulation averages it.

        A trainer whose own loss is already scaled for accumulation is not divided again afterwards, so the divisor is
        ours to apply; otherwise the trainer divides the sum.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            has_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = has_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the trainer does, with the routing statistics since the last training log."""
        if "loss" in logs:
            logs = {**logs, **self._routing_metrics()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into

    def _routing_metrics(self) -> dict[str, float]:
        """Take the statistics gathered since the last call, summed over processes.

        Gathered as objects, since processes may have run different linears, or none, and a reduction of tensors would
        wait for shapes that never come.
        """
        tallies = {prefix: counted.map(torch.Tensor.cpu) for prefix, counted in self._routing_tallies.items()}
        means = {name: torch.stack(values).mean().item() for name, values in self._routing_values.items()}
        self._routing_tallies.clear()
        self._routing_values.clear()
        metrics: dict[str, float] = {}
        merged: dict[str, RoutingTally] = {}
        by_loss: dict[str, list[float]] = defaultdict(list)
        for their_tallies, their_means in gather_object([(tallies, means)]):
            for prefix, counted in their_tallies.items():
                merged[prefix] = merged[prefix] + counted if prefix in merged else counted
            for name, mean in their_means.items():
                by_loss[name].append(mean)
        for prefix, counted in merged.items():
            metrics.update({prefix + name: value for name, value in counted.metrics().items()})
        metrics.update({name: sum(values) / len(values) for name, values in by_loss.items()})
        return {name: round(value, 6) for name, value in metrics.items()}
