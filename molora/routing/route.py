"""Routing: logits in, mixing weights out. The composition of gate, selection and weights; no parameters, no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora.routing.gates import GATES
from molora.routing.selection import SELECTIONS
from molora.routing.weights import WEIGHTS, keep_selected


@dataclass(frozen=True)
class RoutingSpec:
    """The routing choices of one adapter, resolved: no field is left to a default.

    Attributes:
        gate: Name in `GATES`.
        selection: Name in `SELECTIONS`.
        weights: Name in `WEIGHTS`.
        renormalize: Make the weights of the selected experts sum to one.
        temperature: Divides the logits before the gate.
        top_k: Experts kept by `selection="top_k"`.
        top_p: Share of probability kept by `selection="top_p"`.
        threshold: Level of `selection="threshold"`.
        max_threshold: Upper limit of the level that `selection="adaptive_threshold"` learns.
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


@dataclass(frozen=True)
class Routing:
    """What one linear decided for its tokens. All tensors are fp32 except the mask.

    Attributes:
        logits: `[..., E]`.
        probabilities: `[..., E]`, the gate's output.
        selected: Boolean `[..., E]`, the experts kept.
        weights: `[..., E]`, the mixing weights; zero where not selected.
        threshold: `[..., 1]`, the learned level per token; `None` unless the selection has one.
    """

    logits: Tensor
    probabilities: Tensor
    selected: Tensor
    weights: Tensor
    threshold: Tensor | None = None


def adaptive_level(threshold_logit: Tensor, max_threshold: float) -> Tensor:
    """Threshold of each token, `max_threshold * sigmoid(logit)` (AdaMoLE, arXiv 2405.00361, eq. 5), `[..., 1]`."""
    return max_threshold * torch.sigmoid(threshold_logit.float())


def route(logits: Tensor, spec: RoutingSpec, threshold_logit: Tensor | None = None) -> Routing:
    """Turn router logits into mixing weights.

    Args:
        logits: `[..., E]`.
        spec: The routing choices.
        threshold_logit: `[..., 1]`, the threshold net's output; needed by `adaptive_threshold` only.

    Returns:
        The routing decision. A token that selects nothing has all-zero weights.
    """
    probabilities = GATES[spec.gate](logits, spec.temperature)
    level: float | Tensor = spec.threshold
    options: dict[str, Any] = {}
    if spec.selection == "top_k":
        options = {"k": spec.top_k}
    elif spec.selection == "top_p":
        options = {"p": spec.top_p}
    elif spec.selection == "threshold":
        options = {"level": level}
    elif spec.selection == "adaptive_threshold":
        if threshold_logit is None:
            raise ValueError("selection 'adaptive_threshold' needs `threshold_logit`")
        level = adaptive_level(threshold_logit, spec.max_threshold)
        options = {"level": level}
    selected = SELECTIONS[spec.selection](probabilities.detach(), **options)
    values = WEIGHTS[spec.weights](probabilities, level)
    weights = keep_selected(values, selected, spec.renormalize)
    learned = level if isinstance(level, Tensor) else None
    return Routing(logits.float(), probabilities, selected, weights, learned)
