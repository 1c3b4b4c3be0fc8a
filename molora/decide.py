"""One module's routing decision: gather what the router reads, ask it, and turn the logits into weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from molora.errors import MoloraError
from molora.given import Given, given_weights
from molora.observe import tell
from molora.routing import RouterInput, Routing, RoutingExtras, route, second_view
from molora.routing.masks import pool_last, pool_mean
from molora.routing.precision import promote
from molora.routing.scope import RoutingCall

if TYPE_CHECKING:
    from molora.bank import MoLoraLayer
    from molora.plan import ModulePlan

BASE_HIDDEN = "base_hidden"
"""Key in `RoutingCall.shared` of the base model's last hidden states, `[B, S, d]`."""

_FEATURES = frozenset({"input", "hidden", "state"})


class Products(NamedTuple):
    """What one module multiplies its input with, computed together.

    Attributes:
        hidden: `A x`, `[..., R]`.
        router: `x Wᵀ` for the rows of its router, `[..., E]`; `None` where the router multiplies by itself.
        threshold: Likewise for the threshold net, `[..., 1]`.
    """

    hidden: Tensor
    router: Tensor | None = None
    threshold: Tensor | None = None


def decide(layer: MoLoraLayer, name: str, x: Tensor, products: Products, rows: list[int] | None) -> Routing | None:
    """Decide how much each expert counts for each token.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
        x: What the module's experts read, `[..., in]`.
        products: `A x`, and what of the router was multiplied already.
        rows: Which rows of the call's batch these are; `None` for all.

    Returns:
        The decision, or `None` if every expert counts fully.

    Raises:
        MoloraError: If something the router reads was not given.
    """
    plan = layer.molora_plan[name]
    if plan.router == "none":
        return None
    call = layer.routing_scope.current() if layer.routing_scope is not None else None
    group = layer.molora_group.get(name)
    follows = group is not None and group.decides_once and group.leader is not layer
    # What depends on no features any module can look up, where the first one is in a part that does not run again,
    # such as an encoder while text is generated.
    if group is not None and follows and (plan.reads & _FEATURES or group.has_decided(name, call)):
        return group.take(name, call, x.shape[:-1])
    given = None if call is None else call.inputs.expert_weights
    if given is not None and call is not None:
        routing = given_weights(given, plan, x, call, rows)
    else:
        routing = _Decision(layer, name, plan, x, products, call, rows).routing()
    if group is not None and group.decides_once and group.leader is layer:
        group.put(name, call, routing)
    if plan.reads and given is None:
        tell(layer, name, x, products.hidden, routing)
    return routing


def _part(container: nn.ModuleDict, name: str) -> Any:
    return container[name] if name in container else None  # noqa: SIM401  # a ModuleDict has no get


class _Decision:
    """Everything one decision is made from."""

    def __init__(
        self,
        layer: MoLoraLayer,
        name: str,
        plan: ModulePlan,
        x: Tensor,
        products: Products,
        call: RoutingCall | None,
        rows: list[int] | None,
    ) -> None:
        self.layer, self.name, self.plan = layer, name, plan
        self.x, self.products, self.call = x, products, call
        self.given = Given(layer.routing_name, plan, x, call, rows)
        self.spec = layer.molora_spec[name]

    def routing(self) -> Routing:
        """Ask the router and turn its logits into weights."""
        kept = None if self.call is None else self.call.kept
        key = (id(self.layer), self.name)
        if self.plan.per_sequence and kept is not None and key in kept:
            return kept[key]
        routing, tasks = self._fresh(), self.given.tasks_of_tokens()
        if tasks is not None and self.plan.reads == {"task"}:
            return routing.rows(tasks)
        if self.plan.per_sequence and tasks is None and not self.given.scored_by_token():
            routing = replace(routing, per_sequence=True)
            if kept is not None:
                kept[key] = routing
        return routing

    def _fresh(self) -> Routing:
        layer, name, reads = self.layer, self.name, self.plan.reads
        router = layer.router_of(name)
        products = self.products
        by_itself = products.threshold is None and name in layer.molora_threshold
        multiplied = products.router is not None and not by_itself
        features = self._features() if reads & {"input", "state"} and not multiplied else None
        scores = self.given.scores() if "scores" in reads else None
        given = RouterInput(
            features,
            products.hidden,
            layer.molora_ranks[name].expert,
            self.given.task_ids() if "task" in reads else None,
            scores,
            self._state() if "state" in reads else None,
            products.router,
        )
        logits = router(given)
        if "state" in reads:
            logits, state = logits
            self.given.needed_call("a recurrent router").shared["state", name, id(layer)] = state
        threshold, bias = _part(layer.molora_threshold, name), _part(layer.molora_bias, name)
        blend = _part(layer.molora_blend, name)
        mix, factor = (None, None) if blend is None else blend()
        extras = RoutingExtras(
            threshold_logit=None if threshold is None else threshold(features, products.threshold),
            bias=None if bias is None else bias(),
            scores=scores,
            allowed=self.given.allowed(),
            mix=mix,
            mask=self.given.real_tokens(logits) if self.spec.capacity_factor is not None else None,
            training=layer.training,
        )
        routing = route(logits, self.spec, extras)
        if self.spec.view_dropout is not None and layer.training:
            # Whether or not anyone records: a recomputed layer must draw and save the same.
            masked = dropout(features, self.spec.view_dropout)
            routing = replace(routing, view=second_view(router(replace(given, x=masked)), self.spec))
        return routing if factor is None else replace(routing, weights=routing.weights * factor)

    def _features(self) -> Tensor:
        """What the router reads, `[..., in]`; one vector per row for decisions about sequences."""
        x, call = self.x, self.call
        if self.plan.router_input == "base":
            call = self.given.needed_call("router_input='base'")
            if BASE_HIDDEN not in call.shared:
                raise MoloraError(
                    "router_input='base' per token cannot decode with a cache; generate with use_cache=False, or set "
                    "router_level='sequence'."
                )
            x = self.given.of_rows(call.shared[BASE_HIDDEN])
        x = promote(x)
        if self.plan.level == "sequence":
            if x.ndim != 3:
                raise MoloraError(f"router_level='sequence' needs inputs [B, S, d], got {list(x.shape)}.")
            call = self.given.needed_call("router_level='sequence'")
            if call.decoded and call.kept is None:
                raise MoloraError(
                    "a sequence-level router cannot decode with a cache it did not see being filled; generate with "
                    "the PEFT model's own `generate`, or inside `molora.routing_inputs(model, generating=True)`."
                )
            pool = pool_last if self.plan.router_input == "base" else pool_mean
            x = pool(x, self.given.prompt(x))
        if self.spec.router_jitter and self.layer.training and self.spec.selection != "sparsemixer":
            x = x * torch.empty_like(x).uniform_(1 - self.spec.router_jitter, 1 + self.spec.router_jitter)
        return x

    def _state(self) -> Tensor | None:
        before = self.layer.molora_before.get(self.name)
        if before is None:
            return None
        return self.given.needed_call("a recurrent router").shared.get(("state", self.name, id(before)))
