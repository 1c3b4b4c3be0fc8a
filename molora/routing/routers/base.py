"""What every router is: a module that holds the parameters behind the logits, and says what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora.routing.precision import full_precision, promote


@dataclass(frozen=True)
class RouterSize:
    """What a router's parameters are sized by.

    Attributes:
        in_features: Size of the vectors it reads.
        num_experts: Number of logits, null experts included.
        dim: `router_dim`, the size of its inner space, if it has one.
        num_tasks: Number of tasks, for routers that read them.
        num_splits: Logit vectors per task, for `table`.
        bias: Whether the logits have a bias.
        norm: What is done to the input first, one of `NORMS`.
    """

    in_features: int
    num_experts: int
    dim: int | None = None
    num_tasks: int = 1
    num_splits: int = 1
    bias: bool = False
    norm: str = "none"


@dataclass(frozen=True)
class RouterInput:
    """Everything a router may read; each takes what it needs.

    Attributes:
        x: Router features `[..., in]`: one vector per token, or `[B, 1, in]` for one per sequence.
        hidden: `A x`, `[..., R]`.
        expert_of_rank: `[R]`, the expert each rank belongs to.
        task_ids: `[B]`, shaped to broadcast against the tokens.
        scores: External scores, `[..., E]`.
        state: State handed from layer to layer, `[..., h]`; `None` in the first.
        product: `x Wᵀ`, `[..., E]`, where it was computed together with `A x`; only for routers that take it.
    """

    x: Tensor | None = None
    hidden: Tensor | None = None
    expert_of_rank: Tensor | None = None
    task_ids: Tensor | None = None
    scores: Tensor | None = None
    state: Tensor | None = None
    product: Tensor | None = None


ROWS = RouterInput()
"""Calling a router with this gives its rows instead of logits. A call, as under FSDP weights only exist during one."""


class Router(nn.Module):
    """Base class: parameters in, logits `[..., E]` in fp32 or fp64 out.

    Attributes:
        reads: What a decision depends on: `input`, `hidden`, `task`, `scores` or `nothing`. Several are joined by "+".
        default_dim: `router_dim` if the config leaves it out; `None` for routers without inner space.
        has_rows: Whether `weight` holds one vector for each expert, which the features are compared with.
        takes_product: Whether `weight` is all that the features are multiplied with, so that others may do it.
    """

    reads: ClassVar[str] = "input"
    default_dim: ClassVar[int | None] = None
    has_rows: ClassVar[bool] = False
    takes_product: ClassVar[bool] = False
    weight: Tensor

    def forward(self, given: RouterInput) -> Any:
        """Give the logits `[..., E]`, or for `ROWS` a copy of the rows `[E, d]`."""
        # The copy saves nothing for the backward pass, so that recomputed layers need not make it again.
        return self.weight.clone() if given is ROWS else self.logits(given)

    def logits(self, given: RouterInput) -> Any:
        """Map what was given to logits `[..., E]`; a router with a state also gives the next one."""
        raise NotImplementedError

    def by_expert(self) -> dict[str, tuple[Tensor, int]]:
        """The parameters that have a part for each expert, by name, as views, and the dimension of the experts."""
        return {name: (p.data, 0) for name, p in self.named_parameters() if name in ("weight", "bias")}

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw the initial parameters.

        Args:
            init: Name in `ROUTER_INITS`, for the rows that give the logits.
            init_range: Standard deviation of `normal`.
        """


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` in at least fp32, autocast or not: near-ties between experts need the full precision."""
    # Contiguous: for other inputs torch chooses between products that round differently by whether the weight needs a
    # gradient, and a reloaded adapter would differ from the trained one.
    x = promote(x).contiguous()
    weight = weight.to(x.dtype)
    if weight.shape[0] == 1:
        # The product with one row rounds differently when its memory is not aligned, as in a checkpoint mapped from
        # disk; a copy is aligned, so a reloaded adapter agrees bit for bit.
        weight = weight.clone()
    with full_precision(x):
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of zeros, to be drawn later."""
    return nn.Parameter(torch.zeros(*shape))


def uniform_(weight: Tensor, fan_in: int) -> None:
    """Draw as `nn.Linear` does, uniform in ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound)


SHARPNESS = 10.0
"""Length of a router's row drawn as a direction, times √in."""


def directions_(weight: Tensor) -> None:
    """Draw rows of random direction."""
    nn.init.normal_(weight)
    with torch.no_grad():
        weight.copy_(F.normalize(weight, dim=-1) * (SHARPNESS / math.sqrt(weight.shape[-1])))


ROUTER_INITS: dict[str, Callable[[Tensor, float], object]] = {
    "kaiming_uniform": lambda weight, std: uniform_(weight, weight.shape[-1]),
    "normal": lambda weight, std: nn.init.normal_(weight, std=std),
    "zeros": lambda weight, std: nn.init.zeros_(weight),
    "ones": lambda weight, std: nn.init.ones_(weight),
    "orthogonal": lambda weight, std: nn.init.orthogonal_(weight, SHARPNESS / math.sqrt(weight.shape[-1])),
    "directions": lambda weight, std: directions_(weight),
    "prototypes": lambda weight, std: directions_(weight),
    "clusters": lambda weight, std: directions_(weight),
}
"""`kaiming_uniform` is the default of `nn.Linear`: uniform in ±1/√in. `ones` is for `router: static`, whose logits are
equal otherwise too. `orthogonal` and `directions` have rows of length 10/√in, so that logits of a standardised input
are about ten times a cosine. Those of `DATA_INITS` start so too, and are replaced when data is seen."""

DATA_INITS = ("prototypes", "clusters")
"""Those that need data, see `molora.calibration`."""
