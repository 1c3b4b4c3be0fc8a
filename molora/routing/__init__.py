"""Routing as orthogonal choices: router, gate, selection, weights. Pure functions; modules only hold parameters."""

from molora.routing.gates import GATES
from molora.routing.route import Routing, RoutingSpec, route
from molora.routing.router import (
    INPUT_DEPENDENT_ROUTERS,
    ROUTER_INITS,
    ROUTERS,
    LinearRouter,
    StaticRouter,
    ThresholdNet,
)
from molora.routing.selection import SELECTION_OF_FIELD, SELECTIONS
from molora.routing.weights import WEIGHTS

__all__ = [
    "GATES",
    "INPUT_DEPENDENT_ROUTERS",
    "ROUTERS",
    "ROUTER_INITS",
    "SELECTIONS",
    "SELECTION_OF_FIELD",
    "WEIGHTS",
    "LinearRouter",
    "Routing",
    "RoutingSpec",
    "StaticRouter",
    "ThresholdNet",
    "route",
]
