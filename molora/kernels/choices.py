"""The routing choices that the fused operation knows: the static part of one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from molora.errors import MoloraError, one_of

GATES = ("softmax", "sigmoid")
SELECTIONS = ("dense", "top_k", "top_p", "threshold", "adaptive_threshold")


@dataclass(frozen=True)
class Choices:
    """How logits become mixing weights. Hashable, and means what the fields of `RoutingSpec` of these names mean.

    Attributes:
        gate: One of `GATES`.
        selection: One of `SELECTIONS`.
        minus_threshold: Weights are `p - level` instead of `p` (AdaMoLE).
        renormalize: Divide the weights of a token by their sum, if that is positive.
        temperature: Divides logits.
        top_k: Experts that `top_k` keeps.
        top_p: Share of the total that `top_p` reaches.
        threshold: The level of all selections but `adaptive_threshold`.
        max_threshold: The level of `adaptive_threshold` is at most this.
        shared_experts: Experts behind the routed ones that count fully for every token.
    """

    gate: str
    selection: str
    minus_threshold: bool = False
    renormalize: bool = False
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    threshold: float = 0.0
    max_threshold: float = 1.0
    shared_experts: int = 0

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise MoloraError(f"gate of the fused operation: {one_of(self.gate, GATES)}")
        if self.selection not in SELECTIONS:
            raise MoloraError(f"selection of the fused operation: {one_of(self.selection, SELECTIONS)}")
        if self.selection == "top_k" and self.top_k < 1:
            raise MoloraError(f"top_k of the fused operation: got {self.top_k}; give at least 1.")
        if self.shared_experts < 0:
            raise MoloraError(f"shared_experts of the fused operation: got {self.shared_experts}; give 0 or more.")
        if not self.temperature > 0:
            raise MoloraError(f"temperature of the fused operation: got {self.temperature}; give a positive number.")

    @property
    def adaptive(self) -> bool:
        """Whether the level is read from each token."""
        return self.selection == "adaptive_threshold"

    def bank(self, routed: int) -> int:
        """ALL, the experts of a bank in which E are routed."""
        return routed + self.shared_experts


def check_call(given: dict[str, Tensor | None], choices: Choices, backend: str) -> None:
    """Refuse what a kernel would read past the end of, or misread.

    Args:
        given: The tensors of `molora.kernels.fused.mixture` by name.
        choices: Its routing choices.
        backend: `"triton"` or `"torch"`.

    Raises:
        MoloraError: If shapes, dtypes or choices do not fit together.
    """
    x, a, router, b = (given[name] for name in ("x", "a", "router", "b"))
    assert x is not None
    assert a is not None
    assert router is not None
    assert b is not None
    (tokens, width), (experts, ranks), out = x.shape, (router.shape[0], a.shape[0]), b.shape[0]
    shapes = {
        "y": (tokens, out), "a": (ranks, width), "router": (experts, width), "b": (out, ranks),
        "router_bias": (experts,), "threshold_row": (1, width), "threshold_bias": (1,), "balance_bias": (experts,),
        "base_weight": (out, width),
    }  # fmt: skip
    for name, shape in shapes.items():
        tensor = given[name]
        if tensor is not None and tensor.shape != shape:
            raise MoloraError(
                f"{name} of the fused operation has shape {list(tensor.shape)}; x {list(x.shape)}, {ranks} rows of a, "
                f"{experts} of the router and {out} of b ask for {list(shape)}."
            )
    bank = choices.bank(experts)
    if ranks % bank:
        raise MoloraError(
            f"a has {ranks} rows for {bank} experts; the fused operation needs experts of equal rank. Use the "
            "unfused layer for others."
        )
    for name in ("y", "a", "b", "base_weight"):
        tensor = given[name]
        if tensor is not None and tensor.dtype != x.dtype:
            raise MoloraError(f"{name} is {tensor.dtype} and x {x.dtype}; cast them to one dtype first.")
    for name in ("router", "threshold_row"):
        tensor = given[name]
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise MoloraError(f"{name} is {tensor.dtype}; allowed are x's dtype, {x.dtype}, and torch.float32.")
    if choices.adaptive != (given["threshold_row"] is not None):
        raise MoloraError(
            f"selection {choices.selection!r} {'needs' if choices.adaptive else 'has no'} threshold_row; only "
            "'adaptive_threshold' reads one."
        )
    if choices.selection == "top_k" and choices.top_k > experts:
        raise MoloraError(f"top_k is {choices.top_k}, but there are {experts} experts; lower it.")
    if backend == "triton" and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise MoloraError(f"x is {x.dtype}; the kernels take fp32, bf16 and fp16. Pass backend='torch' for others.")
