"""Routers: modules that hold the parameters behind the logits. Always fp32 maths, whatever the model computes in."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def autocast_enabled(x: Tensor) -> bool:
    """Whether products of `x` run under autocast; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Autocast would turn this back into a 16-bit product; near-ties between experts need the full precision.
    weight = weight.float()
    if weight.shape[0] == 1:
        # The product with one row rounds differently when its memory is not aligned, as in a checkpoint mapped from
        # disk; a copy is aligned, so a reloaded adapter agrees bit for bit.
        weight = weight.clone()
    kind = x.device.type
    with torch.autocast(kind, enabled=False) if autocast_enabled(x) else nullcontext():
        return F.linear(x.float(), weight, None if bias is None else bias.float())


class LinearRouter(nn.Module):
    """One logit per expert from the linear's own input, without bias: `logits = x Wᵀ`.

    Args:
        in_features: Size of the input.
        num_experts: E.
    """

    reads_input = True

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to logits `[..., E]` in fp32."""
        return _fp32_linear(x, self.weight)


class StaticRouter(nn.Module):
    """Learned logits that do not depend on the input, so the mixture is one fixed linear map.

    Args:
        in_features: Unused; every router is built alike.
        num_experts: E.
    """

    reads_input = False

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Return the logits `[E]` in fp32; they broadcast over tokens."""
        # A copy: under FSDP the weight's own memory is given up when this returns.
        return self.weight.float().clone()


class ThresholdNet(nn.Module):
    """One threshold logit per token, with bias (AdaMoLE, arXiv 2405.00361, eq. 5).

    Args:
        in_features: Size of the input.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, in_features))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to threshold logits `[..., 1]` in fp32."""
        return _fp32_linear(x, self.weight, self.bias)


def _linear_default(weight: Tensor, std: float) -> None:
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))


def _normal(weight: Tensor, std: float) -> None:
    nn.init.normal_(weight, std=std)


def _zeros(weight: Tensor, std: float) -> None:
    nn.init.zeros_(weight)


ROUTERS: dict[str, type[LinearRouter] | type[StaticRouter] | None] = {
    "linear": LinearRouter,
    "static": StaticRouter,
    "none": None,
}
"""`none`: no router at all; the single expert always counts fully."""

INPUT_DEPENDENT_ROUTERS = frozenset(name for name, router in ROUTERS.items() if router and router.reads_input)
"""Routers whose gate depends on the token; a mixture behind one of them has no single weight to merge."""

ROUTER_INITS: dict[str, Callable[[Tensor, float], None]] = {
    "kaiming_uniform": _linear_default,
    "normal": _normal,
    "zeros": _zeros,
}
"""`kaiming_uniform` is the default of `nn.Linear`: uniform in ±1/√in."""


@torch.no_grad()
def init_router(router: LinearRouter | StaticRouter, init: str, init_range: float) -> None:
    """Draw the initial router weights; a static router starts at equal logits.

    Args:
        router: A module of `ROUTERS`.
        init: Name in `ROUTER_INITS`.
        init_range: Standard deviation of `normal`.
    """
    if router.reads_input:
        ROUTER_INITS[init](router.weight, init_range)
    else:
        nn.init.zeros_(router.weight)


@torch.no_grad()
def init_threshold(net: ThresholdNet) -> None:
    """Draw the threshold net as `nn.Linear` would: weight and bias uniform in ±1/√in."""
    bound = 1 / math.sqrt(net.weight.shape[1])
    nn.init.uniform_(net.weight, -bound, bound)
    nn.init.uniform_(net.bias, -bound, bound)
