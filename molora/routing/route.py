"""Routing: logits in, mixing weights out. The composition of gate, selection and weights; no parameters, no state."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from molora.routing.gates import EXACT_ZEROS, GATES, SUMS_TO_ONE, normalize_logits
from molora.routing.precision import promote
from molora.routing.selection import SELECTIONS, within_capacity
from molora.routing.sparsemixer import sparsemixer
from molora.routing.weights import WEIGHTS, Scored, keep_selected, with_shared


@dataclass(frozen=True)
class RoutingSpec:
    """The routing choices of one adapted module, resolved: no field is left to a default of the config.

    Each attribute is the field of `MoLoraConfig` of that name; `view_dropout` is `mask_ratio` of the routing loss
    `gate_contrastive`, if it compares views.
    """

    gate: str
    selection: str
    weights: str
    renormalize: bool
    temperature: float
    top_k: int
    top_p: float
    threshold: float
    max_threshold: float
    top_gap: float = 0.1
    expert_groups: int = 1
    min_logit: float | None = None
    null_experts: int = 0
    shared_experts: int = 0
    shared_weight: str = "one"
    score_weight: float | None = None
    blend_coefficients: tuple[float, float] = (1.0, 1.0)
    logit_norm: float | None = None
    router_noise: float = 0.0
    router_jitter: float = 0.0
    expert_dropout: float = 0.0
    capacity_factor: float | None = None
    view_dropout: float | None = None


@dataclass(frozen=True)
class Routing:
    """What one module decided for its tokens. All tensors are in fp32 or fp64, except the mask.

    Attributes:
        logits: `[..., E + null_experts]`.
        probabilities: Likewise, the gate's output.
        selected: Boolean, likewise, the experts kept.
        weights: `[..., E + shared_experts]`, the mixing weights; zero where not selected.
        threshold: `[..., 1]`, the learned level per token; `None` unless the selection has one.
        per_sequence: The decision holds for whole sequences: every tensor is `[B, 1, ...]`.
        clean_logits: `[..., E + null_experts]`, the logits without their noise, if there is some.
        view: `[..., E + null_experts]`, probabilities by a second view of the features, for losses that compare them.
    """

    logits: Tensor
    probabilities: Tensor
    selected: Tensor
    weights: Tensor
    threshold: Tensor | None = None
    per_sequence: bool = False
    clean_logits: Tensor | None = None
    view: Tensor | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether the weights were given, so that nothing was selected; see `fixed`."""
        return self.weights is self.logits

    def rows(self, index: Tensor) -> Routing:
        """The same decision about other rows; one that has no rows stays as it is.

        Args:
            index: For each row the one it is taken from.
        """
        tensors: dict[str, Any] = {
            name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor) and value.ndim > 1
        }
        return replace(self, **tensors)


class Recomputed(Routing):
    """A decision that a kernel made, which keeps logits and weights only: the rest is computed when asked for.

    Asked for after the forward pass, so that layers which are computed again save the same tensors as the first time.

    Args:
        logits: `[..., E]`.
        weights: Likewise, and those of shared experts; not zero exactly where an expert was selected.
        spec: The routing choices.
        threshold_logit: `[..., 1]`, if the selection has a learned level.
    """

    spec: RoutingSpec
    given: Tensor | None

    def __init__(
        self, logits: Tensor, weights: Tensor, spec: RoutingSpec, threshold_logit: Tensor | None = None
    ) -> None:
        for name, value in (("logits", logits), ("weights", weights), ("spec", spec), ("given", threshold_logit)):
            object.__setattr__(self, name, value)

    @functools.cached_property
    def probabilities(self) -> Tensor:
        """`[..., E]`, the gate's output."""
        return GATES[self.spec.gate](self.logits, self.spec.temperature, False)

    @functools.cached_property
    def selected(self) -> Tensor:
        """Boolean `[..., E]`."""
        return self.weights.detach()[..., : self.logits.shape[-1]] != 0

    @functools.cached_property
    def threshold(self) -> Tensor | None:
        """`[..., 1]`, the learned level per token, if there is one."""
        return None if self.given is None else adaptive_level(self.given, self.spec.max_threshold)


@dataclass(frozen=True)
class RoutingExtras:
    """What a decision may depend on besides the router's logits. Shapes broadcast against `[..., E]`.

    Attributes:
        threshold_logit: `[..., 1]`, the threshold net's output.
        bias: `[E]`, the balancing bias: experts are ranked with it.
        scores: External scores, such as similarities to a prompt.
        allowed: Boolean, false for banned experts; at least one per token is allowed.
        mix: `[1]`, share of the router in `weights="blend"`.
        mask: Boolean `[...]` without E, true for real tokens.
        training: Whether noise, dropout and capacity apply.
    """

    threshold_logit: Tensor | None = None
    bias: Tensor | None = None
    scores: Tensor | None = None
    allowed: Tensor | None = None
    mix: Tensor | None = None
    mask: Tensor | None = None
    training: bool = False


NO_EXTRAS = RoutingExtras()


def adaptive_level(threshold_logit: Tensor, max_threshold: float) -> Tensor:
    """Threshold of each token, `max_threshold * sigmoid(logit)` (AdaMoLE, arXiv 2405.00361, eq. 5), `[..., 1]`."""
    return max_threshold * torch.sigmoid(promote(threshold_logit))


def route(logits: Tensor, spec: RoutingSpec, extras: RoutingExtras = NO_EXTRAS) -> Routing:
    """Turn router logits into mixing weights.

    Args:
        logits: `[..., E + null_experts]`.
        spec: The routing choices.
        extras: What else the decision depends on.

    Returns:
        The routing decision. A token that selects nothing has all-zero weights.
    """
    clean = _modified(promote(logits), spec, extras)
    logits = _noisy(clean, spec, extras)
    if spec.selection == "sparsemixer":
        selected, values = sparsemixer(logits, spec.top_k, spec.router_jitter, extras.training)
        return Routing(logits, torch.softmax(logits, dim=-1), selected, _mixed(values, selected, spec))
    probabilities = GATES[spec.gate](logits, spec.temperature, extras.training)
    dropped = None
    if spec.expert_dropout and extras.training:
        dropped = torch.rand_like(probabilities) < spec.expert_dropout
        probabilities = probabilities.masked_fill(dropped, 0.0)
    level = _level(spec, extras)
    keys = probabilities if extras.bias is None else probabilities + extras.bias
    selected = _selected(keys.detach(), logits.detach(), level, spec, extras)
    if dropped is not None:
        selected = selected & ~dropped  # not every weighing reads the probability
    scored = Scored(
        logits,
        probabilities,
        keys,
        selected,
        level,
        spec.temperature,
        extras.scores,
        extras.mix,
        spec.blend_coefficients,
    )
    weights = _mixed(WEIGHTS[spec.weights](scored), selected, spec)
    return Routing(
        logits,
        probabilities,
        selected,
        weights,
        level if isinstance(level, Tensor) else None,
        clean_logits=None if clean is logits else clean,
    )


def second_view(logits: Tensor, spec: RoutingSpec) -> Tensor:
    """Probabilities by a second view of the features, `[..., E + null_experts]`, without noise of the gate's own."""
    logits = promote(logits)
    if spec.logit_norm is not None:
        logits = normalize_logits(logits, spec.logit_norm)
    return GATES[spec.gate](logits, spec.temperature, False)


def fixed(weights: Tensor, per_sequence: bool) -> Routing:
    """The decision that was made elsewhere: weights `[..., E]` of any sign."""
    return Routing(weights, weights, weights != 0, weights, per_sequence=per_sequence)


def _modified(logits: Tensor, spec: RoutingSpec, extras: RoutingExtras) -> Tensor:
    """The logits with external scores, normalisation and bans applied, in that order."""
    if spec.score_weight is not None and extras.scores is not None:
        logits = logits + spec.score_weight * extras.scores
    if spec.logit_norm is not None:
        logits = normalize_logits(logits, spec.logit_norm)
    if extras.allowed is not None and (spec.gate in SUMS_TO_ONE or spec.selection == "sparsemixer"):
        logits = logits.masked_fill(~extras.allowed, -torch.inf)
    return logits


def _noisy(logits: Tensor, spec: RoutingSpec, extras: RoutingExtras) -> Tensor:
    if extras.training and spec.router_noise:
        return logits + spec.router_noise * torch.randn_like(logits)
    return logits


def _level(spec: RoutingSpec, extras: RoutingExtras) -> float | Tensor:
    if spec.selection != "adaptive_threshold":
        return spec.threshold
    if extras.threshold_logit is None:
        raise ValueError("selection 'adaptive_threshold' needs `threshold_logit`")
    return adaptive_level(extras.threshold_logit, spec.max_threshold)


def _selected(keys: Tensor, logits: Tensor, level: float | Tensor, spec: RoutingSpec, extras: RoutingExtras) -> Tensor:
    options: dict[str, dict[str, Any]] = {
        "top_k": {"k": spec.top_k},
        "top_k_magnitude": {"k": spec.top_k},
        "top_p": {"p": spec.top_p},
        "threshold": {"level": level},
        "adaptive_threshold": {"level": level},
        "top_1_or_2": {"gap": spec.top_gap},
        "grouped_top_1": {"groups": spec.expert_groups},
    }
    if extras.allowed is not None:
        # Last in every ranking; by magnitude, or by share of the total, that is zero.
        worst = 0.0 if spec.selection in ("top_k_magnitude", "top_p") else torch.finfo(keys.dtype).min
        keys = keys.masked_fill(~extras.allowed, worst)
    selected = SELECTIONS[spec.selection](keys, **options.get(spec.selection, {}))
    if spec.selection == "dense" and spec.gate in EXACT_ZEROS:
        selected = selected & (keys != 0)  # keys have no bias here: one has no say where all are kept
    if extras.allowed is not None:
        selected = selected & extras.allowed
    if spec.min_logit is not None and not extras.training:
        selected = selected & (logits >= spec.min_logit)
    if spec.capacity_factor is not None and extras.training:
        selected = within_capacity(selected, extras.mask, spec.capacity_factor, spec.top_k)
    return selected


def _mixed(values: Tensor, selected: Tensor, spec: RoutingSpec) -> Tensor:
    """Weights of the true experts, then of the shared ones: null experts take part in the selection only."""
    if spec.null_experts:
        values, selected = values[..., : -spec.null_experts], selected[..., : -spec.null_experts]
    return with_shared(keep_selected(values, selected, spec.renormalize), spec.shared_experts, spec.shared_weight)
