"""What calibration data shows of an adapter: who is selected, with which weight, and what each rank contributes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import DataError, MoloraError
from molora.heads import last_logits_only
from molora.modes import evaluating
from molora.plain.fixed import layers_of
from molora.plain.moments import Batch, run_batch
from molora.routing.masks import TokenMasks
from molora.routing.precision import promote
from molora.routing.record import RoutingRecord, record_routing
from molora.watch import Seen, watching


@dataclass
class ModuleStatistics:
    """Sums over the real tokens one module has seen, in fp64.

    E counts routed and shared experts, shared ones last; probabilities are of the routed ones.

    Attributes:
        tokens: How many.
        selected: Tokens with a weight other than zero, `[E]`.
        weight: Sum of absolute weights, `[E]`.
        energy: Sum of squares of what each column of B is multiplied with, `[C]`.
        probability: Sum of what the gate gives before the selection, `[E]`; of the weights if that is not known.
        products: Sum of its products, `[E, E]`.
        hidden: Sum of `A x (A x)ᵀ` over the ranks of all experts, `[R, R]`, if asked for. It is all that low-rank
            approximations need of the second moment of x, which has `in · in` numbers.
        square: Sum of `|x|² / in`, likewise.
        routed_tokens: Tokens, or sequences, whose probabilities were summed up.
    """

    tokens: float = 0.0
    selected: Tensor = field(default_factory=lambda: torch.zeros(()))
    weight: Tensor = field(default_factory=lambda: torch.zeros(()))
    energy: Tensor = field(default_factory=lambda: torch.zeros(()))
    probability: Tensor = field(default_factory=lambda: torch.zeros(()))
    products: Tensor = field(default_factory=lambda: torch.zeros(()))
    hidden: Tensor | None = None
    square: float = 0.0
    routed_tokens: float = 0.0

    @property
    def usage(self) -> Tensor:
        """Share of tokens that use each expert, `[E]`."""
        return self.selected / max(self.tokens, 1)

    @property
    def mean_weight(self) -> Tensor:
        """Mean absolute weight of each expert, `[E]`."""
        return self.weight / max(self.tokens, 1)

    def mass(self, num_experts: int) -> Tensor:
        """Share of the weight of all routed experts that each of them gets, `[E]`."""
        routed = self.weight[:num_experts]
        return routed / routed.sum().clamp(min=torch.finfo(routed.dtype).tiny)

    def correlation(self) -> Tensor:
        """Correlation of the experts' probabilities over tokens, `[E, E]`; 0 for one that never changes."""
        tokens = max(self.routed_tokens, 1)
        mean = self.probability / tokens
        covariance = self.products / tokens - mean.outer(mean)
        deviation = covariance.diagonal().clamp(min=0).sqrt()
        scale = deviation.outer(deviation)
        # What rounding leaves of a variance of zero is no variance.
        known = scale > 1e-12 * (1e-30 + mean.abs().outer(mean.abs()))
        return torch.where(known, covariance / scale.clamp(min=torch.finfo(scale.dtype).tiny), 0.0).clamp(-1, 1)


@torch.no_grad()
def expert_usage(
    model: nn.Module, batches: Iterable[Batch], adapter_name: str = "default", *, moments: bool = False
) -> dict[str, ModuleStatistics]:
    """Run calibration batches through the model, and sum up per module how often and how much experts are used.

    Nothing of a batch is kept: memory does not grow with the data.

    Args:
        model: The adapted model; left in the mode it was in.
        batches: As `molora.data.TaskCollator` makes them. Padding does not count.
        adapter_name: The adapter, which must be the active one.
        moments: Sum up second moments of what A makes of the inputs too, `R · R` numbers a module.

    Returns:
        The statistics by full name of the module in the base model.

    Raises:
        MoloraError: If the model has no such adapter, or it is not active.
        DataError: If there is no token to count.
    """
    layers = layers_of(model, adapter_name)
    if not any(adapter_name in layer.active_adapters and not layer.disable_adapters for layer in layers.values()):
        on = [layer for layer in layers.values() if not layer.disable_adapters]
        active = ", ".join(sorted({name for layer in on for name in layer.active_adapters})) or "none"
        raise MoloraError(
            f"adapter {adapter_name!r} is not active, so nothing runs through it; active: {active}. "
            f"Call `model.set_adapter({adapter_name!r})` first."
        )
    collector = _Collector(adapter_name, {name: ModuleStatistics() for name in layers}, moments)
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    options |= last_logits_only(model)
    with evaluating(model):
        for batch in batches:
            with watching(layers.values(), collector.see), record_routing(model) as records:
                run_batch(model, batch, collector.begin, **options)
            names = {layer.routing_name: key for key, layer in layers.items()}
            for record in records:
                if record.adapter == adapter_name:
                    _add_probabilities(collector.sums[names[record.layer]], record)
    if not any(one.tokens for one in collector.sums.values()):
        raise DataError("the calibration data has no token; give at least one row.")
    for one in collector.sums.values():
        one.hidden = None if one.hidden is None else one.hidden.cpu()
    return collector.sums


def real_tokens(masks: TokenMasks, layer: Any, x: Tensor) -> Tensor:
    """True for those of the tokens `[..., in]` that are no padding, `[T]`."""
    mask = masks.of_layer(layer.routing_name or layer.module_key, x.shape[:-1])
    tokens = x.shape[:-1].numel()
    return torch.ones(tokens, dtype=torch.bool, device=x.device) if mask is None else mask.reshape(-1).to(x.device)


class _Collector:
    """Adds what is seen of each pass to the sums."""

    def __init__(self, adapter_name: str, sums: dict[str, ModuleStatistics], moments: bool) -> None:
        self.adapter_name, self.sums, self.moments = adapter_name, sums, moments
        self._masks = TokenMasks()

    def begin(self, masks: TokenMasks) -> None:
        """A forward pass begins."""
        self._masks = masks

    def see(self, layer: Any, name: str, seen: Seen) -> None:
        """Called by every adapted module."""
        if name == self.adapter_name:
            experts = layer.molora_plan[name].bank_experts
            real = real_tokens(self._masks, layer, seen.x)
            _add(self.sums[layer.module_key], experts, seen, real)
            if self.moments:
                _add_hidden(self.sums[layer.module_key], seen.x.detach().flatten(0, -2)[real], layer.matrices(name)[0])


def _add(sums: ModuleStatistics, experts: int, seen: Seen, real: Tensor) -> None:
    weights = seen.x.new_ones(experts) if seen.weights is None else seen.weights.detach()
    gated = seen.gated.detach()
    if gated.ndim > seen.x.ndim:  # every part of input and output has weights of its own
        weights, gated = weights.abs().mean(dim=-2), gated.square().sum(dim=-2).sqrt()
    weights, gated = (
        values.expand(*seen.x.shape[:-1], values.shape[-1]).flatten(0, -2)[real].double().cpu()
        for values in (weights, gated)
    )
    sums.tokens += len(weights)
    sums.selected = sums.selected + (weights != 0).sum(dim=0).double()
    sums.weight = sums.weight + weights.abs().sum(dim=0)
    sums.energy = sums.energy + gated.square().sum(dim=0)


def _add_hidden(sums: ModuleStatistics, x: Tensor, down: Tensor) -> None:
    """Add second moments of `A x`, on the device where they are computed."""
    x = promote(x)
    hidden = x @ promote(down.detach()).to(x).T
    where = "cpu" if x.device.type == "mps" else x.device  # which has no fp64
    moment = (hidden.T @ hidden).to(where).double()
    sums.hidden = moment if sums.hidden is None else sums.hidden + moment
    sums.square += float(x.square().sum()) / x.shape[-1]


def _add_probabilities(sums: ModuleStatistics, record: RoutingRecord) -> None:
    routed = record.routing.probabilities.shape[-1] - record.null_experts
    values = record.routing.probabilities[..., :routed].detach().reshape(-1, routed)
    if record.mask is not None:
        values = values[record.mask.reshape(-1).to(values.device)]
    values = values.double().cpu()
    sums.routed_tokens += len(values)
    sums.probability = sums.probability + values.sum(dim=0)
    sums.products = sums.products + values.T @ values
