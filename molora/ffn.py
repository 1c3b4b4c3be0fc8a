"""Experts that span a whole feed-forward block (MixLoRA, arXiv 2404.15159), without running the block once per expert.

The block's first linears answer with one hidden per chosen expert, in a new dimension before the last; activation and
product in between are the block's own code, which works on the last dimension and does not mind. The block's last
linear mixes: it is linear, so `Σ_k w_k (W h_k + s B_k A_k h_k) = W (Σ_k w_k h_k) + Σ_k w_k s B_k A_k h_k`, and the
frozen matrix is multiplied once however many experts a token chose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molora.decide import Products, decide
from molora.routing import Routing
from molora.watch import Seen

if TYPE_CHECKING:
    from molora.bank import MoLoraLayer


def _slots(routing: Routing, num_slots: int) -> tuple[Tensor, Tensor]:
    """The experts chosen for each token and their weights, both `[..., K]`."""
    if num_slots == routing.weights.shape[-1]:
        experts = torch.arange(num_slots, device=routing.weights.device)
        return experts.expand_as(routing.weights), routing.weights
    experts = routing.selected.to(routing.weights.dtype).topk(num_slots, dim=-1).indices
    return experts, routing.weights.gather(-1, experts)


def _slots_of(layer: MoLoraLayer, name: str, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each slot's ranks, scaled, `[..., K, R]`, the weights of the slots, `[..., K]`, and of all experts."""
    routing = decide(layer, name, x, Products(hidden), None)
    assert routing is not None
    spec, ranks = layer.molora_spec[name], layer.molora_ranks[name]
    fixed_number = spec.selection in ("top_k", "sparsemixer") and not routing.is_fixed
    experts, weights = _slots(routing, spec.top_k if fixed_number else layer.molora_plan[name].num_experts)
    member = experts.unsqueeze(-1) == ranks.expert
    return member * ranks.rank_scale(weights), weights, routing.weights


def expand_slots(layer: MoLoraLayer, name: str, x: Tensor, down: tuple[Tensor, torch.dtype], result: Tensor) -> Tensor:
    """Give the answer of each chosen expert: `[..., in]` to `[..., K, out]`.

    Args:
        layer: One of the block's first linears.
        name: Name of the adapter.
        x: Input of the block.
        down: `A x` and the dtype that B is multiplied in.
        result: The frozen linear's output, `[..., out]`.
    """
    hidden, dtype = down
    ranks, weights, of_experts = _slots_of(layer, name, x, hidden)
    if layer.watcher is not None:
        gated = (hidden.unsqueeze(-2) * ranks * weights.unsqueeze(-1)).sum(dim=-2)
        layer.watcher(layer, name, Seen(x, gated, of_experts))
    delta = layer.output(name, (hidden.unsqueeze(-2) * ranks).to(dtype))
    return (result.unsqueeze(-2) + delta).to(result.dtype)


def combine_slots(
    layer: MoLoraLayer, name: str, x: Tensor, down: tuple[Tensor, torch.dtype], base: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mix the answers of the chosen experts: `[..., K, in]` to `[..., out]`.

    Args:
        layer: The block's last linear.
        name: Name of the adapter.
        x: One input per chosen expert.
        down: `A x` and the dtype that B is multiplied in.
        base: The frozen linear.
    """
    hidden, dtype = down
    ranks, weights, of_experts = _slots_of(layer, name, x, hidden)
    weights = weights.unsqueeze(-1)
    mixed = (weights * x).sum(dim=-2).to(x.dtype)
    result = base(mixed)
    bias = getattr(layer.get_base_layer(), "bias", None)
    if bias is not None:
        # The frozen linear added its bias once; each expert has it with its weight.
        result = result + ((weights.sum(dim=-2) - 1) * bias).to(result.dtype)
    gated = (hidden * ranks * weights).sum(dim=-2)
    if layer.watcher is not None:
        layer.watcher(layer, name, Seen(mixed, gated, of_experts))
    delta = layer.output(name, gated.to(dtype))
    return (result + delta).to(result.dtype)
