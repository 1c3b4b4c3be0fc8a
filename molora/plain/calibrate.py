"""From a routed adapter and calibration data to the plain LoRAs that come nearest, each with its measured error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from molora.errors import MergeError, MoloraError
from molora.fold import Factors
from molora.kernels import split_factors
from molora.layouts import LAYOUTS
from molora.plain.fit import (
    Moments,
    mean_square,
    relative_error,
    ridge_fit,
    squared_error,
    truncate,
    truncate_unweighted,
)
from molora.plain.fixed import layers_of
from molora.plain.lora import PlainLora
from molora.plain.moments import DEFAULT_MEMORY, PARTS, Batch, collect
from molora.progress import tracked
from molora.routing.precision import promote

METHODS = ("uniform", "usage", "calibrated")
"""How a plain LoRA is made: all experts alike, by their mean weight, or fitted to the data."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Tried for each linear; how far the fit keeps to the experts' mean weights where the data says little."""

CURVE = (1, 2, 4, 8, 16, 32, 64, 128)
"""Ranks at which the energy is told."""


@dataclass(frozen=True)
class LinearFit:
    """How well one linear is replaced.

    Attributes:
        name: Its full name in the base model.
        rank: Rank of its plain LoRA.
        ridge: The ridge that did best on the rows to choose by; `None` where nothing was fitted.
        errors: For each method `E|Δ - Δ'|² / E|Δ|²` on rows that nothing was fitted to: Δ is what the adapter adds to
            the output and Δ' what the plain LoRA adds. 0 is perfect, 1 as bad as leaving the adapter out.
            Where the adapter is a plain LoRA anyway and nothing was fitted, the same of the weights.
        energy: For ranks of `CURVE`, the share of the fitted map's mean squared output that this rank keeps.
    """

    name: str
    rank: int
    ridge: float | None
    errors: dict[str, float]
    energy: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """The plain LoRAs of one adapter.

    Attributes:
        loras: By method; `usage` and `uniform` are missing where experts are no linear maps of the input.
        linears: One entry a linear, in the order they run.
        tokens: Calibration tokens used for each of `PARTS`.
    """

    loras: dict[str, PlainLora]
    linears: list[LinearFit]
    tokens: dict[str, int]

    def by_method(self, method: str) -> PlainLora:
        """The plain LoRA of a method.

        Raises:
            MoloraError: If the method does not go with this adapter.
        """
        if method not in self.loras:
            raise MoloraError(
                f"`--method {method}` weighs linear experts, and those of this adapter are not linear; use "
                "`--method calibrated`."
            )
        return self.loras[method]

    def mean_error(self, method: str) -> float:
        """Mean of a method's error over the linears that route, or over all if none does."""
        routed = [fit for fit in self.linears if fit.ridge is not None] or self.linears
        return sum(fit.errors[method] for fit in routed) / len(routed)


@dataclass
class _Result:
    """One linear: its plain LoRAs by method, as `[r, in + 1]` and `[out, r]`, and how good they are."""

    maps: dict[str, Factors]
    fit: LinearFit


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Mapping[str, Sequence[Batch]],
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    bias: bool = False,
    joint: bool = False,
    max_memory: int = DEFAULT_MEMORY,
    progress: bool = False,
) -> Calibration:
    """Find the plain LoRAs that come nearest to a routed adapter on calibration data.

    `calibrated` is the linear map `A*` with the same B that is nearest in the mean of the squared output, shrunk
    towards `usage` by a ridge chosen on rows of its own. See `molora.plain.fit`.

    Args:
        model: A model with the adapter, which must be its active one.
        batches: For each of `fit`, `choose` and `judge` a sequence of batches, keyword arguments of the model.
        adapter_name: Name of the adapter.
        rank: Rank of the result; by default that of the bank, at which nothing is cut off.
        bias: Fit a constant added to each output too. Only PEFT loads it.
        joint: Fit block after block, each to inputs that come through the plain LoRAs before it. Takes a pass over the
            data for each block.
        max_memory: Bytes of statistics held at a time.
        progress: Show a progress bar.

    Raises:
        MergeError: If experts stand beside whole blocks, which no LoRA can replace.
        MoloraError: If the adapter is unknown, or a linear sees no calibration token.
    """
    layers = layers_of(model, adapter_name)
    _check(layers, adapter_name, joint)
    if missing := [part for part in PARTS if not batches.get(part)]:
        raise MoloraError(f"no calibration batches to {missing[0]}; give some for each of {', '.join(PARTS)}.")
    results = {name: _constant(name, layer, adapter_name, rank) for name, layer in layers.items()}
    routed = {name: layers[name] for name, result in results.items() if result is None}
    tokens = dict.fromkeys(PARTS, 0)
    with ExitStack() as replaced:
        for group in collect(
            model, routed, adapter_name, batches, by_block=joint, max_memory=max_memory, progress=progress
        ):
            for name, moments in tracked(group.items(), "fitting", "linear", shown=progress):
                results[name] = _fit(name, layers[name], adapter_name, moments, rank, bias)
                tokens = {part: max(tokens[part], one.count) for part, one in moments.items()}
            if joint:
                for name in group:
                    replaced.enter_context(_replaced(layers[name], results[name].maps["calibrated"]))
    return _gather(layers, results, tokens, bias)


def batches_by_part(rows: Sequence[Any], collate: Any, batch_size: int) -> dict[str, list[Batch]]:
    """Deal shuffled rows out to the parts, eight to fit to for one each to choose and to judge by, and batch them.

    Args:
        rows: Encoded rows, in random order.
        collate: Makes a batch of some.
        batch_size: Rows in each.

    Raises:
        MoloraError: If there are fewer than ten rows.
    """
    if len(rows) < 10:
        raise MoloraError(f"got {len(rows)} calibration rows; give at least ten, better some hundreds.")
    parts = {
        "fit": [row for index, row in enumerate(rows) if index % 10 < 8],
        "choose": rows[8::10],
        "judge": rows[9::10],
    }
    return {
        part: [collate(list(own[start : start + batch_size])) for start in range(0, len(own), batch_size)]
        for part, own in parts.items()
    }


def _check(layers: Mapping[str, Any], adapter_name: str, joint: bool) -> None:
    for name, layer in layers.items():
        group = layer.molora_group.get(adapter_name)
        if joint and group is not None and group.spans_ffn:
            raise MergeError(
                f"the experts of adapter {adapter_name!r} span feed-forward blocks, whose linears cannot be replaced "
                "one by one while it runs; leave `joint` out."
            )
        if not hasattr(layer, "folded"):
            raise MergeError(
                f"the experts of adapter {adapter_name!r} stand beside the whole block {name!r}, which is no linear "
                "layer, so no LoRA can replace them. Serve the adapter itself, or train with expert_scope='linear'."
            )


def _constant(name: str, layer: Any, adapter_name: str, rank: int | None) -> Any:
    """A linear whose adapter is a plain LoRA already; `None` for others."""
    if layer.is_routed(adapter_name):
        return None
    whole_down, whole_up = (matrix.double() for matrix in layer.constant_factors(adapter_name))
    down, up = truncate_unweighted(whole_down, whole_up, rank or len(whole_down))
    error = relative_error(down, up, whole_down, whole_up) if len(down) < len(whole_down) else 0.0
    padded = (torch.nn.functional.pad(down, (0, 1)), up)
    return _Result(dict.fromkeys(METHODS, padded), LinearFit(name, len(down), None, dict.fromkeys(METHODS, error)))


def _fit(
    name: str, layer: Any, adapter_name: str, moments: Mapping[str, Moments], rank: int | None, bias: bool
) -> _Result:
    start = _start(layer, adapter_name)
    known = moments["fit"] + moments["choose"]
    maps: dict[str, Factors] = {}
    priors = {method: _mixed(layer, adapter_name, weights) for method, weights in _weights(layer, adapter_name, known)}
    for method, fixed in priors.items():
        maps[method] = (torch.nn.functional.pad(fixed, (0, 1)), start)
    prior = priors.get("usage")

    def judged(ridge: float) -> float:
        return squared_error(moments["choose"], ridge_fit(moments["fit"], ridge, prior, bias), start)

    ridge = min(RIDGES, key=judged)
    maps["calibrated"] = (ridge_fit(known, ridge, prior, bias), start)
    cuts = {method: truncate(down, up, known.xx, rank) for method, (down, up) in maps.items()}
    maps = {method: (cut.down, cut.up) for method, cut in cuts.items()}
    energy = cuts["calibrated"].energy
    whole = mean_square(moments["judge"], start)
    errors = {
        method: squared_error(moments["judge"], down, up, start) / whole if whole else 0.0
        for method, (down, up) in maps.items()
    }
    curve = {k: float(energy[min(k, len(energy)) - 1]) for k in CURVE if k <= 2 * len(energy) - 1}
    return _Result(maps, LinearFit(name, len(maps["calibrated"][0]), ridge, errors, curve))


def _start(layer: Any, adapter_name: str) -> Tensor:
    """B over all experts, `[out, C]`, fp64; block by block where each part of the output has a hidden of its own."""
    up = layer.matrices(adapter_name)[1].detach().double()
    splits = layer.molora_plan[adapter_name].num_splits
    return up if splits == 1 else torch.block_diag(*up.chunk(splits, dim=0))


def _weights(layer: Any, adapter_name: str, moments: Moments) -> Iterator[tuple[str, Tensor]]:
    """Fixed mixing weights for the methods that only need those; none where experts are no linear maps."""
    plan = layer.molora_plan[adapter_name]
    if plan.activation is not None or plan.after or moments.weights is None:
        return
    usage = moments.weights / moments.count
    uniform = usage.clone()
    uniform[..., : plan.num_experts] = 1 / plan.num_experts
    yield "uniform", uniform
    yield "usage", usage


def _mixed(layer: Any, adapter_name: str, weights: Tensor) -> Tensor:
    """The map `[C, in]` from the input to what B is multiplied with, while the mixing weights are fixed."""
    plan, ranks = layer.molora_plan[adapter_name], layer.molora_ranks[adapter_name]
    lora_a = promote(layer.matrices(adapter_name)[0].detach()).double()
    if plan.num_splits == 1:
        return LAYOUTS[plan.layout].gated(lora_a.T, weights, ranks, None).T
    parts = lora_a.unflatten(1, (plan.num_splits, -1))
    eye = torch.eye(plan.num_splits, dtype=lora_a.dtype, device=lora_a.device)
    hidden = torch.einsum("rqi,qp->qipr", parts, eye).flatten(0, 1)
    return split_factors(hidden, weights, ranks, None).flatten(1).T


@contextmanager
def _replaced(layer: Any, factors: Factors) -> Iterator[None]:
    """Let a linear answer as with a plain LoRA inside the block."""

    def answer(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if module.routing_scope.silent:  # the base model's own pass, which a router reads the end of
            return None
        x = args[0]
        down, up = (matrix.to(output) for matrix in factors)
        return module.base_layer(x) + linear(linear(x.to(output), down[:, :-1], down[:, -1]), up)

    handle = layer.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


def _gather(
    layers: Mapping[str, Any], results: Mapping[str, _Result], tokens: dict[str, int], bias: bool
) -> Calibration:
    methods = [method for method in METHODS if all(method in result.maps for result in results.values())]
    transposed = any(layer.fan_in_fan_out for layer in layers.values())
    loras = {}
    for method in methods:
        maps = {name: result.maps[method] for name, result in results.items()}
        factors = {name: (down[:, :-1].float(), up.float()) for name, (down, up) in maps.items()}
        constants = {name: (up @ down[:, -1]).float() for name, (down, up) in maps.items()} if bias else {}
        loras[method] = PlainLora(factors, constants if method == "calibrated" else {}, transposed)
    fits = [result.fit for result in results.values()]
    errors = [{method: fit.errors[method] for method in methods} for fit in fits]
    linears = [
        LinearFit(fit.name, fit.rank, fit.ridge, kept, fit.energy) for fit, kept in zip(fits, errors, strict=True)
    ]
    return Calibration(loras, linears, tokens)
