"""`RoutingLossMixin`: adds routing losses and routing statistics to any transformers or TRL trainer."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from molora.losses import LOGITS, LossInputs, is_scheduled, loss_needs, settings_of, total_loss
from molora.quantization import restore_routing, routing_values
from molora.routing.diagnosis import routing_problems
from molora.routing.record import RoutingRecord, record_routing
from molora.routing.stacked import stack_records
from molora.routing.statistics import RoutingTally, tally
from molora.trainers.calibration import CalibrationMixin, restore_statistics
from molora.trainers.callbacks import RoutingScheduleCallback, restore_choices, trained_adapters
from molora.trainers.column_mixin import RoutingColumnsMixin
from molora.trainers.consistency import ModelOutput, consistency_of, model_outputs
from molora.trainers.control import (
    Coefficients,
    RoutingControlCallback,
    balances_globally,
    refuse_to_move_thresholds,
)
from molora.trainers.groups import RouterRatesMixin
from molora.trainers.metrics import RoutingMetrics, add_to_history
from molora.trainers.saving import WholeCheckpointsMixin
from molora.trainers.sharding import restore_frozen, share_out_by_itself

LOG_PREFIX = "molora/"

logger = logging.getLogger(__name__)


class RoutingLossMixin(RoutingColumnsMixin, CalibrationMixin, RouterRatesMixin, WholeCheckpointsMixin):
    """Put first among a trainer's bases: `class MyTrainer(RoutingLossMixin, SFTTrainer)`.

    The losses are those in the `routing_losses` of each active adapter's config. They are added in `compute_loss`, the
    one place every trainer has where the forward passes have run and the backward pass has not, and only in training:
    `eval_loss` stays the task's. Statistics are logged beside the loss under `molora/`; those of each linear are kept
    in the checkpoint's `trainer_state.json`. Experts that die and routers that collapse are warned of, once each.

    Balancing biases, steered thresholds, controlled coefficients and `routing_schedules` of the configs are kept up by
    callbacks. Routers that start from data are calibrated before the first step, and learn at `router_lr_ratio` times
    the learning rate. A resumed training is the same training, as far as it depends on the trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        before = routing_values(kwargs.get("model", args[0] if args else None))
        super().__init__(*args, **kwargs)
        trainer: Any = self
        restore_routing(trainer.model, before)
        share_out_by_itself(trainer.accelerator, trainer.model)
        self._control = RoutingControlCallback()
        self._metrics_of_routing = RoutingMetrics()
        self._moving: dict[str, float] = {}
        trainer.add_callback(self._control)
        trainer.add_callback(RoutingScheduleCallback())

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        refuse_to_move_thresholds(self)
        return super()._prepare_for_training(*args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the routing losses to the trainer's own loss; in evaluation, change nothing.

        Raises:
            RuntimeError: If losses are configured and no layer recorded a decision that carries a gradient.
        """
        own_loss: Any = super().compute_loss  # type: ignore[misc]  # the trainer this is mixed into
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        self._take(inputs, new=inputs is not self._prepared)
        training = self.model.training and torch.is_grad_enabled()
        with self._given(inputs):
            if not training:
                return own_loss(model, inputs, **options)
            passes = 2 if self._adapters_with_consistency() else 1
            batches = [inputs, *(copy.copy(inputs) for _ in range(passes - 1))]  # trainers take things out of theirs
            with self._recorded(inputs, captured=passes > 1) as (records, outputs):
                result = own_loss(model, batches[0], **options)
                first = list(outputs)
                others = [own_loss(model, batch, num_items_in_batch=num_items_in_batch) for batch in batches[1:]]
        loss, *rest = result if return_outputs else (result,)
        added = self._routing_loss(records)
        if others:
            loss = (loss + sum(others)) / passes
            added = added + self._consistency(first, outputs[len(first) :])
        loss = loss + added / self._accumulation_divisor(num_items_in_batch)
        return (loss, *rest) if return_outputs else loss

    @contextmanager
    def _recorded(self, inputs: Any, captured: bool) -> Iterator[tuple[list[RoutingRecord], list[ModelOutput]]]:
        """A block whose decisions are recorded, and, if two passes are compared, the model's outputs too."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        needs = {
            adapter: frozenset().union(*(loss_needs(name, setting) for name, setting in losses.items()))
            for adapter, losses in self._losses().items()
        }
        with ExitStack() as block:
            outputs = block.enter_context(model_outputs(self.model, labels)) if captured else []
            records = block.enter_context(
                record_routing(
                    self.model, with_grad_only=True, labels=labels, needs=needs, packed_rows=self.packed_rows
                )
            )
            yield records, outputs

    def _losses(self) -> dict[str, Mapping[str, Any]]:
        """The routing losses of each active adapter."""
        configs = {adapter: self.model.peft_config[adapter] for adapter in trained_adapters(self.model)}
        return {adapter: getattr(config, "routing_losses", {}) for adapter, config in configs.items()}

    def _routing_loss(self, records: list[RoutingRecord]) -> Tensor | float:
        """Sum the adapters' losses over one micro-batch, and remember their values for the log."""
        stacks = {adapter: stack_records(own) for adapter, own in _by_adapter(records).items()}
        self._control.count(self.model, stacks)
        inputs = self._loss_inputs()
        total: Tensor | float = 0.0
        for adapter, losses in self._losses().items():
            if adapter not in stacks:
                self._check_not_missing(adapter, losses)
                continue
            coefficients = self._coefficients(adapter, losses)
            value, values = total_loss(stacks[adapter], losses, inputs[adapter], coefficients)
            total = total + value
            self._metrics_of_routing.add(self._prefix(adapter), tally(stacks[adapter]), values)
        return total

    def _loss_inputs(self) -> dict[str, LossInputs]:
        """What the adapters' losses read beside decisions; counts of all processes where a loss wants them."""
        wanting = [adapter for adapter, losses in self._losses().items() if balances_globally(losses)]
        everyones = self._control.counts.everyones(self.model, wanting)
        return {
            adapter: LossInputs(
                task_ids=self.task_ids,
                counts={layer: counts.selected for (name, layer), counts in everyones.items() if name == adapter},
                tokens={layer: counts.tokens_now for (name, layer), counts in everyones.items() if name == adapter},
                noise=getattr(self.model.peft_config[adapter], "router_noise", 0.0),
            )
            for adapter in self._losses()
        }

    def _check_not_missing(self, adapter: str, losses: Mapping[str, Any]) -> None:
        steering = ("balance_bias_rate", "experts_per_token")
        set_ = [name for name in steering if getattr(self.model.peft_config[adapter], name, None) is not None]
        if losses or set_:
            what = "routing_losses" if losses else set_[0]
            raise RuntimeError(
                f"{what} of adapter {adapter!r} found no routing decision that carries a gradient. With gradient "
                'checkpointing set gradient_checkpointing_kwargs={"use_reentrant": False}; otherwise the loss was '
                "computed without calling the adapted model."
            )

    def _adapters_with_consistency(self) -> list[str]:
        return [
            adapter
            for adapter, losses in self._losses().items()
            if any(LOGITS in loss_needs(name, setting) for name, setting in losses.items())
        ]

    def _consistency(self, first: list[ModelOutput], second: list[ModelOutput]) -> Tensor | float:
        """The loss that compares two passes; nothing if there was only one."""
        total: Tensor | float = 0.0
        for adapter in self._adapters_with_consistency():
            losses = self._losses()[adapter]
            _, options = settings_of(losses["consistency"])
            value = consistency_of(first, second, options.get("max_tokens", 256))
            total = total + self._coefficients(adapter, losses)["consistency"] * value
            self._metrics_of_routing.add(self._prefix(adapter), None, {"consistency": value})
        return total

    def _prefix(self, adapter: str) -> str:
        """What the names of an adapter's metrics begin with."""
        return LOG_PREFIX if len(self._losses()) == 1 else f"{LOG_PREFIX}{adapter}/"

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
            metrics, tallies = self._metrics_of_routing.take()
            logs = {**logs, **metrics, **self._moving}
            self._moving.clear()
            add_to_history(self._control.state["history"], self.state.global_step, tallies)
            self._warn(tallies)
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into

    def _coefficients(self, adapter: str, losses: Mapping[str, Any]) -> Coefficients:
        """The coefficients of an adapter's losses in the step that runs; those that move are kept for the log."""
        state: Any = self.state  # type: ignore[attr-defined]  # the trainer this is mixed into
        used = self._control.coefficients(adapter, losses, state.global_step, state.max_steps)
        held = self._control.state["coefficients"].get(adapter, {})
        for name, value in used.items():
            if name in held or is_scheduled(losses[name]) or name == "l1_sparsity":
                mean = sum(value.values()) / len(value) if isinstance(value, dict) else value
                self._moving[f"{self._prefix(adapter)}{name}_coefficient"] = mean
        return used

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]  # the trainer this is mixed into
        restore_choices(self.model, self.state.best_model_checkpoint)

    def _start_anew(self) -> None:
        self._metrics_of_routing = RoutingMetrics()
        self._moving.clear()

    def _state_to_continue(self) -> dict[str, Any]:
        return {**super()._state_to_continue(), "routing": self._metrics_of_routing.state()}

    def _continue_from(self, state: dict[str, Any]) -> None:
        super()._continue_from(state)
        trainer: Any = self
        first = trainer.is_world_process_zero()
        self._metrics_of_routing.continue_from(state["routing"], trainer.args.device, first)
        if self._resumed_from is not None and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            restore_frozen(trainer.model, self._resumed_from)
            restore_statistics(trainer.model, self._resumed_from)

    def _warn(self, tallies: Mapping[str, RoutingTally]) -> None:
        if not self.is_world_process_zero():
            return
        for counted in tallies.values():
            for kind, sentence in routing_problems(counted):
                if kind not in self._control.state["warned"]:
                    self._control.state["warned"].append(kind)
                    logger.warning("step %d: %s", self.state.global_step, sentence)


def _by_adapter(records: list[RoutingRecord]) -> dict[str, list[RoutingRecord]]:
    found: dict[str, list[RoutingRecord]] = defaultdict(list)
    for record in records:
        found[record.adapter].append(record)
    return found
