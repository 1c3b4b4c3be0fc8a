"""What a layer tells a recorder beside its decision, for losses that compare experts or prototypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from molora.layouts import ACTIVATIONS, LAYOUTS
from molora.losses.routing_contrastive import token_sums
from molora.routing import ROWS, Affine, Recomputed, Routing
from molora.routing.record import LayerParts

if TYPE_CHECKING:
    from molora.bank import MoLoraLayer


def tell(layer: MoLoraLayer, name: str, x: Tensor, hidden: Tensor | None, routing: Routing) -> None:
    """Hand a decision to the recorder, if one listens.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
        x: What the module's router reads, `[..., in]`.
        hidden: `A x`, as in `parts_of`.
        routing: The decision.
    """
    if layer.routing_recorder is None:
        return
    plan, seen = layer.molora_plan[name], _flat(routing, x)
    parts = partial(parts_of, layer, name, x, hidden, seen)
    vectors = 1 if seen is routing else plan.num_splits
    layer.routing_recorder.append(layer.routing_name, name, seen, plan.ranks, plan.spec.null_experts, parts, vectors)


def hand_on(
    layer: MoLoraLayer, name: str, x: Tensor, logits: Tensor, weights: Tensor, threshold_logit: Tensor | None
) -> None:
    """Give a kernel's decision to the modules that route with this one, and to the recorder.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
        x: What it decided about, `[..., in]`.
        logits: Of its tokens, `[T, E]` or `[E]`.
        weights: Likewise, with those of shared experts behind them.
        threshold_logit: `[T, 1]`, if there is one.
    """
    group = layer.molora_group.get(name)
    shared = group is not None and group.decides_once
    if not shared and layer.routing_recorder is None:
        return
    level = None if threshold_logit is None else threshold_logit.view(*x.shape[:-1], 1)
    logits, weights = (value.view(*x.shape[:-1], value.shape[-1]) for value in (logits, weights))
    routing = Recomputed(logits, weights, layer.molora_spec[name], level)
    if group is not None and shared:
        group.put(name, None if layer.routing_scope is None else layer.routing_scope.current(), routing)
    tell(layer, name, x, None, routing)


def _flat(routing: Routing, x: Tensor) -> Routing:
    """A decision with several weight vectors per row or token has them in place of tokens."""
    if routing.logits.ndim <= x.ndim:
        return routing
    parts = ("logits", "probabilities", "selected", "weights")
    return replace(routing, **{part: getattr(routing, part).flatten(1, -2) for part in parts})


def parts_of(
    layer: MoLoraLayer,
    name: str,
    x: Tensor,
    hidden: Tensor | None,
    routing: Routing,
    needs: frozenset[str],
    mask: Tensor | None,
) -> LayerParts:
    """Gather what is asked for.

    Called while the layer runs: under FSDP and offloading its weights exist at no other time, hence copies. Nothing
    here saves a tensor for the backward pass, as recomputed layers do not come by.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
        x: What the module's router reads, `[..., in]`.
        hidden: `A x`; `None` where nothing can need it.
        routing: The decision.
        needs: Names of `LayerParts`.
        mask: Which tokens are real; `None` for all.
    """
    ranks, plan = layer.molora_ranks[name], layer.molora_plan[name]
    sums, counts = None, None
    if "token_sums" in needs:
        sums, counts = token_sums(x, routing.selected[..., : plan.num_experts], mask)
        router = layer.router_of(name)
        if isinstance(router, Affine):  # its rows are in the space of the normalised input
            sums = router.normalized_sums(sums, counts)
    activation = ACTIVATIONS[plan.activation] if plan.activation else None

    def to_columns(hidden: Tensor) -> Tensor:
        return LAYOUTS[plan.layout].gated(hidden, None, ranks, activation)

    return LayerParts(
        hidden=hidden if "columns" in needs else None,
        columns=to_columns if "columns" in needs else None,
        down=layer.down_matrix(name) if "down" in needs else None,
        up=layer.up_matrix(name) if "up" in needs else None,
        experts=ranks.expert if needs & {"columns", "down", "up"} else None,
        rows=layer.router_of(name)(ROWS)[: plan.num_experts] if "rows" in needs else None,
        token_sums=sums,
        token_counts=counts,
    )
