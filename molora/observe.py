"""What a layer tells a recorder beside its decision, for losses that compare experts or prototypes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from molora.layouts import ACTIVATIONS, LAYOUTS
from molora.losses.routing_contrastive import token_sums
from molora.routing import ROWS, Routing
from molora.routing.record import LayerParts

if TYPE_CHECKING:
    from molora.bank import MoLoraLayer


def parts_of(
    layer: MoLoraLayer,
    name: str,
    x: Tensor,
    hidden: Tensor,
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
        hidden: `A x`.
        routing: The decision.
        needs: Names of `LayerParts`.
        mask: Which tokens are real; `None` for all.
    """
    ranks, plan = layer.molora_ranks[name], layer.molora_plan[name]
    sums, counts = None, None
    if "token_sums" in needs:
        sums, counts = token_sums(x, routing.selected[..., : plan.num_experts], mask)
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
