"""Routers, chosen by name (`router` in the config). Modules that hold parameters; every one of them maps to logits."""

from __future__ import annotations

from molora.routing.routers.affine import NORMS, Affine
from molora.routing.routers.base import (
    DATA_INITS,
    ROUTER_INITS,
    ROWS,
    Router,
    RouterInput,
    RouterSize,
)
from molora.routing.routers.by_input import (
    ArrowRouter,
    CosineRouter,
    LinearRouter,
    MlpRouter,
    NormalizedRouter,
    PrototypeRouter,
    RecurrentRouter,
)
from molora.routing.routers.by_other import (
    ActivationNormRouter,
    ActivationRouter,
    DomainRouter,
    ExternalRouter,
    StaticRouter,
    TableRouter,
    TaskRouter,
    UnitActivationRouter,
)

ROUTERS: dict[str, type[Router] | None] = {
    "linear": LinearRouter,
    "mlp": MlpRouter,
    "cosine": CosineRouter,
    "prototype": PrototypeRouter,
    "normalized": NormalizedRouter,
    "arrow": ArrowRouter,
    "recurrent": RecurrentRouter,
    "activation": ActivationRouter,
    "unit_activation": UnitActivationRouter,
    "activation_norm": ActivationNormRouter,
    "task": TaskRouter,
    "table": TableRouter,
    "domain": DomainRouter,
    "external": ExternalRouter,
    "static": StaticRouter,
    "none": None,
}
"""`none`: no router at all; every expert always counts fully."""


def reads(router: str) -> frozenset[str]:
    """What the decisions of a router depend on: a set of `input`, `hidden`, `task`, `scores`, `state`."""
    kind = ROUTERS[router]
    return frozenset() if kind is None else frozenset(kind.reads.split("+")) - {"nothing"}


__all__ = [
    "DATA_INITS",
    "NORMS",
    "ROUTERS",
    "ROUTER_INITS",
    "ROWS",
    "Affine",
    "Router",
    "RouterInput",
    "RouterSize",
    "reads",
]
