"""The common case, which kernels and short cuts are written for: a linear router per token, and plain experts."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.experts import BankWeight
from molora.held import at_hand, held
from molora.kernels.choices import GATES, SELECTIONS, Choices
from molora.routing import BalanceBias, RoutingSpec, ThresholdNet
from molora.routing.routers import LinearRouter

_WEIGHTS = ("probability", "probability_minus_threshold")


@functools.lru_cache(maxsize=256)
def choices_of(spec: RoutingSpec, training: bool) -> Choices | None:
    """The choices as kernels know them, or `None` if they do not.

    Args:
        spec: The routing choices.
        training: Whether what is for training only applies.
    """
    if spec.gate not in GATES or spec.selection not in SELECTIONS or spec.weights not in _WEIGHTS:
        return None
    if spec.null_experts or spec.score_weight is not None or spec.logit_norm is not None:
        return None
    if spec.shared_experts and spec.shared_weight != "one":
        return None
    noise = spec.router_noise or spec.router_jitter or spec.expert_dropout or spec.capacity_factor is not None
    if (noise or spec.view_dropout is not None) if training else spec.min_logit is not None:
        return None
    return Choices(
        gate=spec.gate,
        selection=spec.selection,
        minus_threshold=spec.weights == "probability_minus_threshold",
        renormalize=spec.renormalize,
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        threshold=spec.threshold,
        max_threshold=spec.max_threshold,
        shared_experts=spec.shared_experts,
    )


class Standard(NamedTuple):
    """What a standard adapter has on a module, for reading.

    Attributes:
        choices: How logits become weights.
        down: A, `[R, in]`.
        up: B, `[out, R]`.
        router: The router, which another module may hold.
        threshold: The threshold net, if there is one.
        bias: The balancing bias, likewise.
        scale: Factor of every expert.
        follows: Whether another module decides for this one.
    """

    choices: Choices
    down: Tensor
    up: Tensor
    router: LinearRouter
    threshold: ThresholdNet | None
    bias: BalanceBias | None
    scale: float
    follows: bool


def drops(layer: Any, name: str) -> bool:
    """Whether an adapter drops something now."""
    dropout = held(layer, "molora_dropout", name)
    return dropout.training and not isinstance(dropout, nn.Identity)


def standard_of(layer: Any, name: str) -> Standard | None:
    """What an adapter has on a module, or `None` if it is not the common case or cannot be read.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
    """
    plan = layer.molora_plan[name]
    if not plan.is_common:
        return None
    # A graph is made once, and its maker does not look into caches.
    known = choices_of.__wrapped__ if torch.compiler.is_compiling() else choices_of
    choices = known(layer.molora_spec[name], layer.training)
    if choices is None:
        return None
    if layer.routing_recorder is not None and layer.routing_recorder.wants("columns", name):
        return None
    call = None if layer.routing_scope is None else layer.routing_scope.current()
    if call is not None and (call.inputs.expert_weights is not None or call.inputs.expert_mask is not None):
        return None
    group = layer.molora_group.get(name)
    router = held(layer if group is None else group.leader, "molora_router", name)
    down, up, threshold = held(layer, "molora_A", name), held(layer, "molora_B", name), None
    if type(router) is not LinearRouter or type(down) is not BankWeight or type(up) is not BankWeight:
        return None
    if choices.adaptive:
        threshold = held(layer, "molora_threshold", name)
        if threshold is not None and not at_hand(threshold):
            return None
    if not (at_hand(router) and at_hand(down) and at_hand(up)) or down.bias is not None:
        return None
    return Standard(
        choices,
        down.weight,
        up.weight,
        router,
        threshold,
        held(layer, "molora_bias", name),
        plan.scales[0],
        group is not None and group.decides_once and group.leader is not layer,
    )
