"""How a served mixture weighs its ranks, from one product of the input. Plain torch; no server is needed for it.

A server multiplies a token with one packed matrix, `[A; W; v]`: the experts' rows, the router's and the threshold
net's. From these products follows the factor of every rank, and the routing is that of training: `molora.routing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molora.experts import RankMap
from molora.routing import RoutingExtras, RoutingSpec, route
from molora.routing.routers import ROUTERS, RouterInput, RouterSize

ROWS, MAGNITUDE = "rows", "magnitude"
ACTIVATIONS = ("activation", "unit_activation", "activation_norm")
SOURCES = (ROWS, MAGNITUDE, *ACTIVATIONS)
"""Where logits come from: rows of a router, as they are or by magnitude (Arrow), or `A x` itself."""

STANDARDIZE, NORMALIZE = "standardize", "normalize"
_EPS = {STANDARDIZE: 1e-5, NORMALIZE: 1e-12}
"""Those of `F.layer_norm` and `F.normalize`."""


@dataclass(frozen=True, eq=False)
class Gate:
    """How one linear of a mixture weighs its ranks.

    The packed rows are, in this order: those of the experts `[R]`; the rows that logits come from, and behind them the
    threshold's, if there is one; these again for every further part of their values. Rows for logits are the router's,
    one for each logit. A source among `ACTIVATIONS` reads those of the experts, if they are served in one part, else
    it has a copy of them in parts.

    Attributes:
        spec: The routing choices.
        ranks: Rank of each expert, those of shared ones last.
        scales: Scale of each expert.
        logits: Number of logits, with those of null experts.
        source: One of `SOURCES`.
        parts: Numbers of the served precision that one value of the router is the sum of.
        input_scale: What products with the router are divided by, not with the threshold: the `standardize` deviation
            of a token's input, its `normalize` length, or nothing.
        offset: What is added to the products with the router, `[logits]` fp32, or `None`.
        threshold_offset: Likewise for the threshold, `[1]`.
        balance: The balancing bias, `[logits]` fp32, or `None`.
    """

    spec: RoutingSpec
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    logits: int
    source: str = ROWS
    parts: int = 1
    input_scale: str | None = None
    offset: Tensor | None = None
    threshold_offset: Tensor | None = None
    balance: Tensor | None = None
    rank_map: RankMap = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_map", RankMap(self.ranks, self.scales))

    @property
    def rank(self) -> int:
        """R, the experts' ranks together."""
        return sum(self.ranks)

    @property
    def has_threshold(self) -> bool:
        """Whether the threshold is learned."""
        return self.spec.selection == "adaptive_threshold"

    @property
    def logit_rows(self) -> int:
        """Rows of one part that logits come from; none where logits are `A x` itself."""
        if self.source in ACTIVATIONS:
            return self.rank * (self.parts > 1)
        return self.logits

    @property
    def router_rows(self) -> int:
        """Rows behind those of the experts, of one part."""
        return self.logit_rows + self.has_threshold

    @property
    def rows(self) -> int:
        """Packed rows: the rank that a server has to have room for."""
        return self.rank + self.parts * self.router_rows


def rank_gate(products: Tensor, gate: Gate, x: Tensor | None = None) -> Tensor:
    """The factor of every rank.

    Args:
        products: Of the tokens with the packed rows, `[T, rows]` or wider, fp32.
        gate: How to weigh.
        x: The tokens themselves, `[T, in]`; needed for an `input_scale`.

    Returns:
        `[T, R]`, what the experts' products are multiplied with before B, the experts' scales included.
    """
    routed = products[:, gate.rank : gate.rows].unflatten(1, (gate.parts, gate.router_rows))
    # The smallest part first, so that nothing of it is lost.
    values = routed.flip(1).sum(dim=1)
    logits = values[:, : gate.logit_rows] if gate.logit_rows else products[:, : gate.rank]
    if gate.input_scale is not None:  # a threshold is of the input as it is
        assert x is not None
        logits = logits * input_factor(x, gate.input_scale)
    if gate.offset is not None:
        logits = logits + gate.offset.to(logits.device)
    if gate.source != ROWS:
        logits = _SOURCES[gate.source](logits, gate)
    threshold = values[:, -1:] if gate.has_threshold else None
    if threshold is not None and gate.threshold_offset is not None:
        threshold = threshold + gate.threshold_offset.to(threshold.device)
    balance = None if gate.balance is None else gate.balance.to(logits.device)
    weights = route(logits, gate.spec, RoutingExtras(threshold_logit=threshold, bias=balance)).weights
    spread = gate.rank_map  # of the gate's device, which need not be that of the tokens
    return weights[:, spread.expert.to(weights.device)] * spread.scale.to(weights)


def input_factor(x: Tensor, scale: str) -> Tensor:
    """One over the deviation or the length of each token's input, `[T, in]` to `[T, 1]`."""
    x = x.float()
    if scale == NORMALIZE:
        return 1 / x.norm(dim=-1, keepdim=True).clamp(min=_EPS[NORMALIZE])
    return torch.rsqrt(x.var(dim=-1, unbiased=False, keepdim=True) + _EPS[STANDARDIZE])


def _of_activations(name: str) -> Callable[[Tensor, Gate], Tensor]:
    def logits(hidden: Tensor, gate: Gate) -> Tensor:
        kind = ROUTERS[name]
        assert kind is not None
        router = kind(RouterSize(0, gate.logits))
        found: Tensor = router(RouterInput(hidden=hidden, expert_of_rank=gate.rank_map.expert.to(hidden.device)))
        return found

    return logits


_SOURCES: dict[str, Callable[[Tensor, Gate], Tensor]] = {
    MAGNITUDE: lambda logits, gate: logits.abs(),
    **{name: _of_activations(name) for name in ACTIVATIONS},
}
