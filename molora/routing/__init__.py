"""Routing as orthogonal choices: router, gate, selection, weights. Pure functions; modules only hold parameters."""

from molora.routing.gates import GATES, SUMS_TO_ONE
from molora.routing.parts import BalanceBias, Blend, ThresholdNet
from molora.routing.route import (
    NO_EXTRAS,
    Recomputed,
    Routing,
    RoutingExtras,
    RoutingSpec,
    fixed,
    route,
    second_view,
)
from molora.routing.routers import (
    DATA_INITS,
    NORMS,
    ROUTER_INITS,
    ROUTERS,
    ROWS,
    Affine,
    Router,
    RouterInput,
    RouterSize,
    reads,
)
from molora.routing.selection import SELECTIONS, SELECTIONS_OF_FIELD
from molora.routing.weights import WEIGHTS

__all__ = [
    "DATA_INITS",
    "GATES",
    "NORMS",
    "NO_EXTRAS",
    "ROUTERS",
    "ROUTER_INITS",
    "ROWS",
    "SELECTIONS",
    "SELECTIONS_OF_FIELD",
    "SUMS_TO_ONE",
    "WEIGHTS",
    "Affine",
    "BalanceBias",
    "Blend",
    "Recomputed",
    "Router",
    "RouterInput",
    "RouterSize",
    "Routing",
    "RoutingExtras",
    "RoutingSpec",
    "ThresholdNet",
    "fixed",
    "reads",
    "route",
    "second_view",
]
