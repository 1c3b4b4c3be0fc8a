"""The fast path of an adapted linear: what is stacked for one read of the input, and the sum of its parts.

Whatever cannot be stacked goes the way of `MoLoraModule.delta`, which needs nothing but modules that can be called.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molora.decide import Products, decide
from molora.experts import RankMap
from molora.held import at_hand, held, plain_linear, weights_at_hand
from molora.kernels.products import product_dtype
from molora.kernels.stacked import NOT_SPREAD, GatedUp, Spread, Stack, StackedDown
from molora.layouts import ACTIVATIONS, LAYOUTS
from molora.routing.parts import ThresholdNet
from molora.routing.precision import compute_dtype
from molora.standard import drops

DOWN, UP = ("molora_frozen_A", "molora_A"), ("molora_frozen_B", "molora_B")
"""Containers of A and of B, the frozen experts first."""


class Matrices(NamedTuple):
    """What one module multiplies its input with.

    Attributes:
        down: A, in one or two parts, the frozen experts first.
        router: Rows of the router, if others may multiply them.
        threshold: Row of the threshold net, likewise.
    """

    down: list[Tensor]
    router: Tensor | None
    threshold: Tensor | None

    @property
    def all(self) -> list[Tensor]:
        """Every one of them."""
        return [*self.down, *(matrix for matrix in (self.router, self.threshold) if matrix is not None)]


def only_adapter(layer: Any) -> str | None:
    """The one adapter that applies to a module, or `None` if there are more or none, or it is merged or off."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    applied = [name for name in layer.active_adapters if name in layer.molora_plan]
    return applied[0] if len(applied) == 1 else None


def can_stack(layer: Any, name: str) -> bool:
    """Whether the fast path can do what an adapter adds to a module."""
    plan = layer.molora_plan[name]
    if plan.num_splits > 1 or plan.layout == "shards" or plan.after:
        return False
    return weights_at_hand(layer, (*DOWN, *UP), name) is not None


def matrices_of(layer: Any, name: str) -> Matrices:
    """Everything a module multiplies its input with that can be multiplied at once."""
    down = weights_at_hand(layer, DOWN, name) or []
    plan, spec = layer.molora_plan[name], layer.molora_spec[name]
    raw = plan.level == "token" and plan.router_input == "module" and spec.view_dropout is None
    if not raw or (spec.router_jitter and layer.training) or plan.router == "none":
        return Matrices(down, None, None)
    group = layer.molora_group.get(name)
    if group is not None and group.decides_once and group.leader is not layer:
        return Matrices(down, None, None)
    router, threshold = layer.router_of(name), None
    net = held(layer, "molora_threshold", name)
    if type(net) is ThresholdNet and at_hand(net):
        threshold = net.rows()
    rows = router.rows() if router.takes_product and at_hand(router) else None
    return Matrices(down, rows, threshold)


def add_stacked(layer: Any, name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output of an adapted linear, `[..., in]` to `[..., out]`.

    Args:
        layer: The linear.
        name: Name of the one adapter.
        x: Its input.
        args: Further arguments of the frozen linear.
        kwargs: Likewise.
    """
    base = layer.base_layer
    fuse = not args and not kwargs and plain_linear(base) and _joins(base, x)
    products, y = _products(layer, name, x, base if fuse else None)
    if y is None and fuse and product_dtype(base.weight.dtype, x.device) != base.weight.dtype:
        y = StackedDown.apply(x, base.weight, base.bias, Stack(base.weight.dtype, 0))[0]  # for its gradient's sake
    elif y is None:
        y = base(x, *args, **kwargs)
    hidden = products.hidden
    bias = _bias(layer, name)
    if bias is not None:
        hidden = hidden + bias.to(hidden.dtype)
        products = products._replace(hidden=hidden)
    if layer.molora_plan[name].drops_hidden:
        hidden = layer.molora_dropout[name](hidden)
        products = products._replace(hidden=hidden)
    routing = decide(layer, name, x, products, None)
    return _add_gated(layer, name, y, hidden, None if routing is None else routing.weights, fuse)


def _add_gated(layer: Any, name: str, y: Tensor, hidden: Tensor, weights: Tensor | None, in_place: bool) -> Tensor:
    plan, ranks = layer.molora_plan[name], layer.molora_ranks[name]
    if plan.layout != "separate" or plan.activation or weights is None:
        activation = ACTIVATIONS[plan.activation] if plan.activation else None
        hidden = LAYOUTS[plan.layout].gated(hidden, weights, ranks, activation).to(hidden.dtype)
        weights = None
    ups = weights_at_hand(layer, UP, name) or []
    up = ups[0] if len(ups) == 1 else torch.cat(ups, dim=1)
    spread = NOT_SPREAD if weights is None else _spread(ranks, weights)
    return GatedUp.apply(y, hidden, weights, up, spread, in_place and _is_ours(y))


def _is_ours(y: Tensor) -> bool:
    """Whether the frozen output may be written into: modes such as selective checkpointing keep outputs for later."""
    return y.is_contiguous() and not y._is_view() and not torch._C._len_torch_dispatch_stack()


def _spread(ranks: RankMap, weights: Tensor) -> Spread:
    scales, rank = ranks.spread(weights)
    return Spread(scales, rank, ranks.expert)


def _bias(layer: Any, name: str) -> Tensor | None:
    banks = [bank for container in DOWN if (bank := held(layer, container, name)) is not None]
    biases = [bank.bias for bank in banks if bank.bias is not None]
    return None if not biases else torch.cat(biases)


def _joins(base: nn.Module, x: Tensor) -> bool:
    """Whether the frozen linear would compute in the dtype of its weight."""
    weight, bias = base.weight, base.bias
    if weight.device != x.device or (bias is not None and bias.dtype != weight.dtype):
        return False
    return compute_dtype(x, x.dtype) == weight.dtype


def _dtype(layer: Any, name: str, x: Tensor) -> torch.dtype:
    """In which A and B are multiplied."""
    return compute_dtype(x, layer._dtype_of(name) if layer.cast_input_dtype_enabled else x.dtype)


def _products(layer: Any, name: str, x: Tensor, base: nn.Module | None) -> tuple[Products, Tensor | None]:
    """Products of `x`, computed here or before by a sibling, and the frozen linear's output if it was computed."""
    if _drops_input(layer, name):
        dropped, dtype = layer.molora_dropout[name](x), _dtype(layer, name, x)
        down = matrices_of(layer, name).down
        _, *hidden = StackedDown.apply(dropped, None, None, Stack(dtype, len(down)), *down)
        return Products(_side_by_side(hidden)), None
    shared = layer.molora_input.get(name)
    taken = None if shared is None else shared.take(layer, x)
    if taken is not None:
        return taken, None
    dtype = _dtype(layer, name, x)
    readers = [layer] if shared is None else _readers(layer, name, shared.members, dtype, x)
    sets = [matrices_of(reader, name) for reader in readers]
    downs = [matrix for matrices in sets for matrix in matrices.down]
    others = [m for matrices in sets for m in (matrices.router, matrices.threshold) if m is not None]
    # Behind a graph the siblings are one node of it. Behind a leaf their backward passes may come one by one, and the
    # first would free what the others need: there they share the products and no more.
    as_one = len(readers) == 1 or x.grad_fn is not None
    with_frozen = base is not None and (as_one or not x.requires_grad)
    weight, bias = (base.weight, base.bias) if base is not None and with_frozen else (None, None)
    with torch.set_grad_enabled(torch.is_grad_enabled() and as_one):
        y, *parts = StackedDown.apply(x, weight, bias, Stack(dtype, len(downs)), *downs, *others)
    products = _sorted_out(sets, iter(parts[: len(downs)]), iter(parts[len(downs) :]))
    makers = [partial(_put_together, dtype, own, matrices, as_one) for own, matrices in products]
    if shared is not None and len(readers) > 1:
        rest = zip(readers[1:], makers[1:], sets[1:], strict=True)
        shared.put(x, {id(reader): (maker, matrices.all) for reader, maker, matrices in rest})
        if layer.routing_scope is not None:
            layer.routing_scope.waiting.add(shared)
    return makers[0](x), y


def _readers(layer: Any, name: str, members: list[Any], dtype: torch.dtype, x: Tensor) -> list[Any]:
    """The module itself, and those of its siblings that will run after it and multiply in the same way."""
    if x.is_inference() or not any(member is layer for member in members):
        return [layer]  # the last: a replica of the module that the list is about
    later = members[next(place for place, member in enumerate(members) if member is layer) + 1 :]
    return [layer, *(member for member in later if _reads_alike(member, name, dtype, x))]


def _reads_alike(layer: Any, name: str, dtype: torch.dtype, x: Tensor) -> bool:
    """Whether a sibling's products may be computed before it runs."""
    changes = layer._forward_pre_hooks or "forward" in vars(layer)  # such as hooks that bring its weights
    if changes or only_adapter(layer) != name or not can_stack(layer, name) or _drops_input(layer, name):
        return False
    return _dtype(layer, name, x) == dtype and all(m.device == x.device for m in matrices_of(layer, name).all)


def _drops_input(layer: Any, name: str) -> bool:
    """Whether A reads another input than the router: one of its own, with parts dropped."""
    return drops(layer, name) and not layer.molora_plan[name].drops_hidden


def _sorted_out(sets: list[Matrices], downs: Iterator[Tensor], others: Iterator[Tensor]) -> list[tuple[Any, Matrices]]:
    """Give each module its products back, in the order in which they were stacked."""
    found = []
    for matrices in sets:
        number = len(matrices.all) - len(matrices.down)
        found.append(([*islice(downs, len(matrices.down)), *islice(others, number)], matrices))
    return found


def _put_together(dtype: torch.dtype, parts: list[Tensor], of: Matrices, in_graph: bool, x: Tensor) -> Products:
    """The products of one module, which get their node of the graph now if they have none yet."""
    if not in_graph and torch.is_grad_enabled():
        _, *parts = StackedDown.apply(x, None, None, Stack(dtype, len(of.down), tuple(parts)), *of.all)
    others = iter(parts[len(of.down) :])
    router = None if of.router is None else next(others)
    threshold = None if of.threshold is None else next(others)
    return Products(_side_by_side(parts[: len(of.down)]), router, threshold)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
