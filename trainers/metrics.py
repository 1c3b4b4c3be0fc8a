"""Routing statistics between two logs: gathered on the device, fetched once, averaged over processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from molora.routing.statistics import RoutingTally

MAX_ENTRIES = 256
"""Entries of a history; once there are more, every second one of the older goes."""


class RoutingMetrics:
    """Sums up what happens between two logs."""

    def __init__(self) -> None:
        self._tallies: dict[str, RoutingTally] = {}
        self._values: dict[str, Tensor] = {}  # sum and number, `[2]`

    def add(self, prefix: str, counted: RoutingTally | None, values: Mapping[str, Tensor]) -> None:
        """Remember the decisions and the unweighted losses of one micro-batch.

        Args:
            prefix: What the names of an adapter's metrics begin with.
            counted: Its decisions.
            values: Its losses, scalars.
        """
        if counted is not None:
            before = self._tallies.get(prefix)
            self._tallies[prefix] = counted if before is None else before + counted
        for name, value in values.items():
            counted_value = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float32)])
            before_value = self._values.get(prefix + name)
            self._values[prefix + name] = counted_value if before_value is None else before_value + counted_value

    def take(self) -> tuple[dict[str, float], dict[str, RoutingTally]]:
        """Give everything since the last call, over all processes, which must all call this; and start anew.

        Returns:
            Means by name, and the tallies by prefix, on the CPU.
        """
        tallies, values = self._everyones()
        self._tallies.clear()
        self._values.clear()
        metrics = {prefix + name: value for prefix, t in tallies.items() for name, value in t.metrics().items()}
        metrics.update({name: total / number for name, (total, number) in values.items()})
        return {name: round(value, 6) for name, value in metrics.items()}, tallies

    def state(self) -> dict[str, Any]:
        """What waits for the next log, over all processes, which must all call this; for JSON."""
        tallies, values = self._everyones()
        return {
            "tallies": {
                prefix: {
                    field.name: list(tally.layers) if field.name == "layers" else getattr(tally, field.name).tolist()
                    for field in fields(tally)
                }
                for prefix, tally in tallies.items()
            },
            "values": values,
        }

    def continue_from(self, state: Mapping[str, Any], device: Any, first: bool) -> None:
        """Take up what `state` gave.

        Args:
            state: What it gave.
            device: Where the model is.
            first: Whether this is the first process, which goes on with the tallies of all: `take` adds them up.
        """
        for prefix, columns in state["tallies"].items() if first else ():
            tensors = {name: torch.tensor(c, device=device) for name, c in columns.items() if name != "layers"}
            self._tallies[prefix] = RoutingTally(tuple(columns["layers"]), **tensors)
        for name, values in state["values"].items() if first else ():
            self._values[name] = torch.tensor(values, device=device)

    def _everyones(self) -> tuple[dict[str, RoutingTally], dict[str, list[float]]]:
        """Tallies, and sums and numbers of values, summed over processes.

        Gathered as objects, since processes may have run different linears, or none, and a reduction of tensors would
        wait for shapes that never come.
        """
        own = _fetched(self._tallies, self._values)
        merged: dict[str, RoutingTally] = {}
        by_name: dict[str, list[float]] = {}
        for their_tallies, their_values in gather_object([own]):
            for prefix, counted in their_tallies.items():
                merged[prefix] = merged[prefix] + counted if prefix in merged else counted
            for name, values in their_values.items():
                before = by_name.get(name, [0.0, 0.0])
                by_name[name] = [one + other for one, other in zip(before, values, strict=True)]
        return merged, by_name


def _fetched(
    tallies: Mapping[str, RoutingTally], values: Mapping[str, Tensor]
) -> tuple[dict[str, RoutingTally], dict[str, list[float]]]:
    """Bring everything to the CPU in one transfer."""
    columns = [getattr(counted, field.name) for counted in tallies.values() for field in fields(counted)[1:]]
    tensors = [*columns, *values.values()]
    arrived = iter(_moved(tensors))
    moved = {prefix: counted.map(lambda _: next(arrived)) for prefix, counted in tallies.items()}
    return moved, {name: next(arrived).tolist() for name in values}


def _moved(tensors: Sequence[Tensor]) -> list[Tensor]:
    if not tensors:
        return []
    device = tensors[0].device
    flat = torch.cat([tensor.to(device, torch.float32).flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def add_to_history(history: dict[str, Any], step: int, tallies: Mapping[str, RoutingTally]) -> None:
    """Append per-linear statistics to the history that a checkpoint keeps for reports.

    Args:
        history: By prefix `layers`, their names, and `entries`, each with `step` and lists of one item per linear:
            `load` (share of selections per expert), `experts_per_token`, `entropy` (nats) and `threshold`. Changed.
        step: The optimizer step.
        tallies: By prefix, what happened since the last entry.
    """
    for prefix, tally in tallies.items():
        kept = history.setdefault(prefix, {"layers": [], "entries": []})
        _know(kept, [layer for layer in tally.layers if layer not in kept["layers"]])
        tokens = tally.tokens.clamp(min=1)
        rows = {
            "load": tally.load(),
            "experts_per_token": tally.selected.sum(dim=-1) / tokens,
            "entropy": tally.entropy / tokens,
            "threshold": tally.threshold / tokens,
        }
        found = {layer: index for index, layer in enumerate(tally.layers)}
        order = [found.get(layer) for layer in kept["layers"]]  # not every step runs every linear
        entry: dict[str, Any] = {"step": step}
        for name, values in rows.items():
            listed = values.double().mul(1e4).round().div(1e4).tolist()
            entry[name] = [None if index is None else listed[index] for index in order]
        kept["entries"].append(entry)
        if len(kept["entries"]) > MAX_ENTRIES:
            kept["entries"] = [*kept["entries"][:-1:2], kept["entries"][-1]]


def _know(kept: dict[str, Any], layers: Sequence[str]) -> None:
    """Give linears that had not run before a place, empty in what is past."""
    kept["layers"] += layers
    for entry in kept["entries"]:
        for values in entry.values():
            if isinstance(values, list):
                values += [None] * len(layers)
