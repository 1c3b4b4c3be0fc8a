"""What routers do with each task: the figures that follow from sums over tokens (`molora.routing.affinity`).

Shapes: L linears of equally many experts, N tasks, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from molora.routing.affinity import Sums, load, mutual_information
from molora.routing.statistics import DEAD_BELOW

FIGURES = {
    "dead_experts": "experts with less than a tenth of an even share of selections",
    "largest_load": "largest share of selections of one expert",
    "dead_by_weight": "the same of gate weight",
    "largest_weight": "largest share of gate weight",
    "active_experts": "experts a token uses",
    "gate_entropy": "nats, of a token's mixing weights",
    "router_entropy": "nats, of its router's probabilities",
    "information_answers": "bits that the expert tells about the task, answer tokens",
    "information": "the same, all tokens",
}
"""Figures of a linear, and what they are. Tasks count equally in shares and information, tokens in the rest."""


def dead(of_experts: Tensor) -> Tensor:
    """Number of experts with less than a tenth of an even share: `[..., E]` to `[...]`."""
    return (of_experts < DEAD_BELOW / of_experts.shape[-1]).sum(dim=-1).to(of_experts.dtype)


def figures(sums: Sums) -> dict[str, Tensor]:
    """The `FIGURES`, each `[L]`."""
    selections, weight = load(sums.selected), load(sums.weights)
    tokens = sums.tokens.sum(dim=-1).clamp(min=1)
    return {
        "dead_experts": dead(selections),
        "largest_load": selections.max(dim=-1).values,
        "dead_by_weight": dead(weight),
        "largest_weight": weight.max(dim=-1).values,
        "active_experts": sums.selected.sum(dim=(-1, -2)) / tokens,
        "gate_entropy": sums.gate_entropy.sum(dim=-1) / tokens,
        "router_entropy": sums.router_entropy.sum(dim=-1) / tokens,
        "information_answers": mutual_information(sums.answers),
        "information": mutual_information(sums.weights),
    }


def summary(by_layers: Mapping[tuple[str, ...], Sums]) -> dict[str, dict[str, float]]:
    """Figures of each linear, and behind them their means under the name `mean`."""
    found: dict[str, dict[str, float]] = {}
    for layers, sums in by_layers.items():
        values = {name: value.tolist() for name, value in figures(sums.cpu()).items()}
        for at, layer in enumerate(layers):
            found[layer] = {name: round(value[at], 5) for name, value in values.items()}
    if found:
        found["mean"] = {name: sum(one[name] for one in found.values()) / len(found) for name in FIGURES}
    return found
