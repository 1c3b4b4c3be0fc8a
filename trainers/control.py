"""What moves by itself between steps: balancing biases, thresholds, and coefficients that follow how routing does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from molora.errors import MoloraError
from molora.losses import ADAPTIVE, adapted_coefficients, coefficient_at, next_coefficient, settings_of
from molora.routing.balance import balanced_bias, steered_threshold
from molora.routing.find import adapted_modules
from molora.routing.stacked import StackedRouting
from molora.trainers.callbacks import trained_adapters
from molora.trainers.counts import Key, LinearCounts, StepCounts
from molora.trainers.sharding import change_whole

STATE = "molora"
"""Key in `TrainerState.stateful_callbacks`, which a checkpoint holds in `trainer_state.json`."""

Coefficients = dict[str, float | dict[str, float]]
"""By loss: one number, or one for each linear."""


class RoutingControlCallback(TrainerCallback):
    """Moves balancing biases, thresholds and controlled coefficients after each optimizer step.

    `RoutingLossMixin` installs it and hands it the decisions of every micro-batch. All processes take the same step,
    from the counts of all of them. A forward pass never changes anything: gradient checkpointing runs it twice.

    Biases move for adapters whose config has a `balance_bias_rate`, thresholds towards its `experts_per_token`, the
    coefficient of `l1_sparsity` towards the `experts_per_token` of that loss, and those of `load_balancing` with
    `adaptive` by how far each linear is out of balance.

    Attributes:
        counts: The selections of the step that runs.
        state: What a checkpoint keeps: `coefficients` by adapter, `history` for reports, and what was `warned` of.
    """

    def __init__(self) -> None:
        self.counts = StepCounts()
        self.state: dict[str, Any] = {"coefficients": {}, "history": {}, "warned": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint that is resumed, if one is."""
        self.counts.clear()
        saved = state.stateful_callbacks.get(STATE)
        self.state = saved if saved is not None else {"coefficients": {}, "history": {}, "warned": []}
        state.stateful_callbacks[STATE] = self.state

    def count(self, model: Any, stacks: Mapping[str, Sequence[StackedRouting]]) -> None:
        """Count the decisions of one micro-batch, by adapter, where something will ask for them."""
        self.counts.start_micro_batch()
        for adapter, own in stacks.items():
            config = model.peft_config[adapter]
            if _is_steered(config) or balances_globally(getattr(config, "routing_losses", {})):
                self.counts.add(adapter, own)

    def coefficients(self, adapter: str, losses: Mapping[str, Any], step: int, steps: int) -> Coefficients:
        """The coefficients of an adapter's losses in one step.

        Args:
            adapter: Name of the adapter.
            losses: `routing_losses` of its config.
            step: The step that runs, from 0.
            steps: All steps of the training.
        """
        held = self.state["coefficients"].get(adapter, {})
        return {name: held.get(name, coefficient_at(setting, step, steps)) for name, setting in losses.items()}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep gradients from the biases that are steered: two that pull at one bias meet short of what is wanted."""
        model = kwargs["model"]
        for adapter in trained_adapters(model):
            if _experts_wanted(model.peft_config[adapter]) is not None:
                for _, bias in _thresholds(model, adapter):
                    if bias.grad is not None:
                        bias.grad.zero_()  # and not None, so that every optimizer has a state of it to save

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move everything by one step, and count anew."""
        model = kwargs["model"]
        steered = [name for name in trained_adapters(model) if _is_steered(model.peft_config[name])]
        everyones = self.counts.everyones(model, steered)
        self.counts.clear()
        for adapter in steered:
            config = model.peft_config[adapter]
            own = {key: counts for key, counts in everyones.items() if key[0] == adapter}
            if getattr(config, "balance_bias_rate", None) is not None:
                _move_biases(model, adapter, config.balance_bias_rate, own)
            wanted = _experts_wanted(config)
            if wanted is not None:
                _move_thresholds(model, adapter, wanted, own)
            self._move_coefficients(adapter, config.routing_losses, own)

    def _move_coefficients(self, adapter: str, losses: Mapping[str, Any], counts: Mapping[Key, LinearCounts]) -> None:
        for name, setting in losses.items():
            _, options = settings_of(setting)
            adaptive = ADAPTIVE.given(options.get("adaptive"))
            if name != "l1_sparsity" and adaptive is None:
                continue
            held: Coefficients = self.state["coefficients"].setdefault(adapter, {})
            before = held.get(name, coefficient_at(setting, 0, 1))
            if adaptive is not None:
                held[name] = _adapted(before, counts, adaptive)
            elif isinstance(before, float):
                active = _experts_per_token(counts)
                alpha = options.get("alpha", 1.2)
                held[name] = next_coefficient(before, active, options.get("experts_per_token", 2), alpha)


def balances_globally(losses: Mapping[str, Any]) -> bool:
    """Whether a loss reads the selections of all processes."""
    return any(settings_of(setting)[1].get("scope") == "global" for setting in losses.values())


def _is_steered(config: Any) -> bool:
    """Whether something of an adapter follows its counts."""
    losses = getattr(config, "routing_losses", {})
    adaptive = [name for name, s in losses.items() if ADAPTIVE.given(settings_of(s)[1].get("adaptive")) is not None]
    steers = getattr(config, "balance_bias_rate", None) is not None or _experts_wanted(config) is not None
    return steers or "l1_sparsity" in losses or bool(adaptive)


def _experts_wanted(config: Any) -> float | None:
    """How many experts the thresholds of an adapter are to keep on average, if they are to."""
    return getattr(config, "experts_per_token", None)


def _experts_per_token(counts: Mapping[Key, LinearCounts]) -> float:
    """Experts that a token used, on average over linears."""
    selected = torch.stack([of_linear.selected.sum() for of_linear in counts.values()]).sum()
    tokens = torch.stack([of_linear.tokens for of_linear in counts.values()]).sum()
    return float(selected / tokens.clamp(min=1))


def _adapted(
    before: float | dict[str, float], counts: Mapping[Key, LinearCounts], numbers: Mapping[str, float]
) -> dict[str, float]:
    """The next coefficient of each linear, by its name."""
    layers = [layer for _, layer in counts]
    old = before if isinstance(before, dict) else dict.fromkeys(layers, before)
    width = max(len(of_linear.selected) for of_linear in counts.values())
    selected = [_with_mean_nulls(of_linear) for of_linear in counts.values()]
    padded = torch.stack([torch.nn.functional.pad(c, (0, width - len(c))) for c in selected]).double()
    experts = torch.tensor([len(c) for c in selected], device=padded.device)
    start = torch.tensor([old[layer] for layer in layers], dtype=torch.float64, device=padded.device)
    moved = adapted_coefficients(start, padded, experts, **numbers)
    return dict(zip(layers, moved.tolist(), strict=True))


def _with_mean_nulls(counts: LinearCounts) -> Tensor:
    """Selections, `[E + null_experts]`, those of null experts evened out: they are copies of one another."""
    true, null = counts.selected.split([len(counts.selected) - counts.null_experts, counts.null_experts])
    return torch.cat([true, null.mean().expand_as(null)]) if counts.null_experts else true


def _move_biases(model: Any, adapter: str, rate: float, counts: Mapping[Key, LinearCounts]) -> None:
    for name, bias in _biases(model, adapter):
        selected = counts[adapter, name].selected if (adapter, name) in counts else torch.zeros(bias.shape)
        if bias.shape != selected.shape:
            raise MoloraError(
                f"the balancing bias of {name!r} has shape {tuple(bias.shape)} for {len(selected)} experts: FSDP 1 "
                "has cut it up. Train with FSDP2 or DDP, or without `balance_bias_rate`."
            )
        change_whole(bias, lambda whole, own=selected: balanced_bias(whole, own.to(whole.device), rate))


def _biases(model: Any, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Name of the linear and its bias."""
    for name, module in adapted_modules(model):
        if adapter in module.molora_bias:
            yield name, module.molora_bias[adapter].weight


def _move_thresholds(model: Any, adapter: str, wanted: float, counts: Mapping[Key, LinearCounts]) -> None:
    for name, bias in _thresholds(model, adapter):
        of_linear = counts[adapter, name]
        true = of_linear.selected[: len(of_linear.selected) - of_linear.null_experts].sum()
        # A linear that no token reached stays as it is.
        active = torch.where(of_linear.tokens > 0, true / of_linear.tokens.clamp(min=1), wanted)
        change_whole(bias, lambda whole, now=active: steered_threshold(whole, now.to(whole.device), wanted))


def _thresholds(model: Any, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Name of the linear and the bias of its threshold net."""
    for name, module in adapted_modules(model):
        if adapter in module.molora_threshold:
            yield name, module.molora_threshold[adapter].bias


def refuse_to_move_thresholds(trainer: Any) -> None:
    """Refuse ways of sharing a model out in which a trained parameter cannot be changed between steps.

    Raises:
        MoloraError: If an active adapter has `experts_per_token`, with DeepSpeed or FSDP 1.
    """
    moved = [name for name in trained_adapters(trainer.model) if _experts_wanted(trainer.model.peft_config[name])]
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_deepspeed_enabled:
        reason = "DeepSpeed's optimizer has a copy of its own of every trained parameter"
    elif plugin is not None and plugin.fsdp_version == 1:
        reason = "FSDP 1 cuts up what they are held in"
    else:
        return
    if moved:
        raise MoloraError(
            f"experts_per_token of adapter {moved[0]!r} moves thresholds between steps, and {reason}. Train with "
            "FSDP2 or DDP, or without `experts_per_token`."
        )
