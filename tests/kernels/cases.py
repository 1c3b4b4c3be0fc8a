"""Calls of the fused operation, and the same by `molora.routing.route` and autograd, in any dtype."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from molora.kernels.choices import Choices
from molora.routing import RoutingExtras, RoutingSpec, route
from molora.routing.precision import promote

HAS_GPU = torch.cuda.is_available()

DEVICES = [
    pytest.param(
        "cpu", id="interpreter", marks=pytest.mark.skipif(HAS_GPU, reason="kernels are compiled for the GPU")
    ),
    pytest.param(
        "cuda", id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]
    ),
]


@dataclass(frozen=True)
class Case:
    """One call; `aux` sends gradients into logits, threshold logits and weights too."""

    choices: Choices
    experts: int = 6
    rank: int = 3
    tokens: int = 19
    width: int = 34
    out: int = 37
    router_bias: bool = False
    balance_bias: bool = False
    threshold_bias: bool = False
    base_weight: bool = False
    aux: bool = False
    only_first: int = 0
    narrow_router: bool = False
    scale: float = 0.5

    @property
    def bank(self) -> int:
        """Experts with the shared ones."""
        return self.experts + self.choices.shared_experts


TOP_2 = Choices("softmax", "top_k", renormalize=True, top_k=2)
ADAMOLE = Choices("softmax", "adaptive_threshold", minus_threshold=True, renormalize=True, max_threshold=1 / 6)

CASES = {
    "top 2 of 8, rank 8, odd sizes": Case(TOP_2, 8, 8, 33, 50, 70, router_bias=True, base_weight=True, aux=True),
    "top 2, sigmoid, balanced": Case(replace(TOP_2, gate="sigmoid"), balance_bias=True, base_weight=True),
    "adaptive, minus threshold": Case(ADAMOLE, threshold_bias=True, router_bias=True, base_weight=True, aux=True),
    "adaptive, sigmoid, no bias": Case(Choices("sigmoid", "adaptive_threshold", max_threshold=0.9), aux=True),
    "top p, sigmoid": Case(Choices("sigmoid", "top_p", top_p=0.6, temperature=0.7), 5, 4, balance_bias=True, aux=True),
    "top p, softmax": Case(Choices("softmax", "top_p", top_p=0.7, renormalize=True, temperature=0.4)),
    "threshold, some tokens without expert": Case(
        Choices("sigmoid", "threshold", threshold=0.7, minus_threshold=True, renormalize=True), 3, 2, aux=True
    ),
    "threshold, softmax": Case(Choices("softmax", "threshold", threshold=0.2), base_weight=True),
    "dense, softmax": Case(Choices("softmax", "dense", temperature=1.5), 5, 1, router_bias=True),
    "dense, sigmoid, minus threshold": Case(Choices("sigmoid", "dense", minus_threshold=True, threshold=0.1), 3, 5),
    "dense, sums below zero": Case(
        Choices("softmax", "dense", minus_threshold=True, renormalize=True, threshold=0.3), 4, 2, aux=True
    ),
    "one of everything": Case(Choices("sigmoid", "dense"), 1, 1, 1, 1, 1, aux=True),
    "more than a few tokens": Case(TOP_2, 4, 4, 70, 20, 40, base_weight=True),
    "one token": Case(TOP_2, 8, 4, 1, 40, 40, base_weight=True),
    "all experts": Case(replace(TOP_2, top_k=6)),
    "experts without tokens": Case(TOP_2, only_first=3, router_bias=True),
    "64 experts of rank 1": Case(replace(TOP_2, top_k=4), 64, 1, 17, 16, 40, aux=True),
    "more ranks than a program holds": Case(TOP_2, 6, 12, 17, 20, 40, base_weight=True, aux=True),
    "adaptive, more ranks than a program holds": Case(ADAMOLE, 9, 8, 17, 20, 40, threshold_bias=True, aux=True),
    "a rank that no program holds": Case(replace(TOP_2, top_k=1), 2, 70, 5, 20, 20),
    "two shared experts": Case(
        replace(TOP_2, shared_experts=2),
        6,
        8,
        33,
        50,
        70,
        router_bias=True,
        balance_bias=True,
        base_weight=True,
        aux=True,
    ),
    "a shared expert, adaptive": Case(replace(ADAMOLE, shared_experts=1), 5, 3, threshold_bias=True, aux=True),
    "shared experts, one token": Case(replace(TOP_2, shared_experts=3), 5, 4, 1, 40, 40),
    "shared experts, many tokens": Case(replace(TOP_2, gate="sigmoid", shared_experts=1), 3, 4, 70, 20, 40, aux=True),
    "more shared experts than routed ones": Case(Choices("sigmoid", "dense", shared_experts=20), 2, 2, aux=True),
    "shared experts, more ranks than a program holds": Case(replace(ADAMOLE, shared_experts=3), 7, 8, 17, aux=True),
    "router in the dtype of x": Case(ADAMOLE, narrow_router=True, base_weight=True),
}


def tensors_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor | None]:
    """The tensors of a call by name. Every draw is the same in each dtype, up to rounding."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    wide, ranks = case.width**-0.5, case.bank * case.rank
    exact = torch.promote_types(dtype, torch.float32)
    routing = dtype if case.narrow_router else exact
    given: dict[str, Tensor | None] = {
        "x": draw(case.tokens, case.width),
        "y": draw(case.tokens, case.out),
        "a": draw(ranks, case.width, scale=wide),
        "router": draw(case.experts, case.width, scale=wide, dtype=routing),
        "b": draw(case.out, ranks, scale=ranks**-0.5),
        "router_bias": draw(case.experts, scale=0.1, dtype=routing),
        "threshold_row": draw(1, case.width, scale=wide, dtype=routing),
        "threshold_bias": draw(1, dtype=routing),
        "balance_bias": draw(case.experts, scale=0.1, dtype=exact),
        "base_weight": draw(case.out, case.width, scale=wide),
    }
    if case.only_first:
        given["router_bias"][case.only_first :] = -1e4  # type: ignore[index]
    for name in ("router_bias", "threshold_bias", "balance_bias", "base_weight"):
        if not getattr(case, name):
            given[name] = None
    if not case.choices.adaptive:
        given["threshold_row"] = None
    if given["base_weight"] is not None:
        given["y"] = given["x"] @ given["base_weight"].t()  # type: ignore[operator]
    return given


def incoming(case: Case, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
    """Gradients of y', logits, threshold logits and weights."""
    generator = torch.Generator().manual_seed(2)
    exact = torch.promote_types(dtype, torch.float32)
    shapes = [(case.tokens, case.out), (case.tokens, case.experts), (case.tokens, 1), (case.tokens, case.bank)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    found = [drawn[0].to(device, dtype), *(grad.to(device, exact) for grad in drawn[1:])]
    return [found[0], *(grad if case.aux else None for grad in found[1:3]), found[3] if case.aux else None]


TRAINED = ("x", "y", "a", "router", "b", "router_bias", "threshold_row", "threshold_bias")


def by_routing(given: dict[str, Tensor | None], case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What the operation promises, in torch's autograd: `y'`, logits, threshold logits, weights."""
    x, base, c = given["x"], given["base_weight"], case.choices
    y = given["y"] if base is None else x @ base.t()
    logits = promote(x) @ promote(given["router"]).t()
    if given["router_bias"] is not None:
        logits = logits + promote(given["router_bias"])
    level = None if given["threshold_row"] is None else promote(x) @ promote(given["threshold_row"]).t()
    if given["threshold_bias"] is not None:
        level = level + promote(given["threshold_bias"]) if level is not None else None
    spec = RoutingSpec(
        gate=c.gate,
        selection=c.selection,
        weights="probability_minus_threshold" if c.minus_threshold else "probability",
        renormalize=c.renormalize,
        temperature=c.temperature,
        top_k=c.top_k,
        top_p=c.top_p,
        threshold=c.threshold,
        max_threshold=c.max_threshold,
        shared_experts=c.shared_experts,
    )
    weights = route(logits, spec, RoutingExtras(threshold_logit=level, bias=given["balance_bias"])).weights
    gated = (x @ given["a"].t()) * (weights * case.scale).repeat_interleave(case.rank, dim=-1)
    return y + gated.to(x.dtype) @ given["b"].t(), logits, level, weights


def differentiated(outputs, given, grads, trained=TRAINED) -> dict[str, Tensor]:
    """Outputs, and the gradients of a loss that is linear in them, by name."""
    named = dict(zip(("y'", "logits", "threshold_logit", "weights"), outputs, strict=True))
    pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None and out is not None]
    pairs = [(out, grad) for out, grad in pairs if out.numel() and out.requires_grad]
    wanted = {name: given[name] for name in trained if given[name] is not None and given[name].requires_grad}
    outs, sent = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, list(wanted.values()), sent, allow_unused=True)
    results = {name: out for name, out in named.items() if out is not None and out.numel()}
    for (name, tensor), grad in zip(wanted.items(), found, strict=True):
        results[f"d {name}"] = torch.zeros_like(tensor) if grad is None else grad
    return {name: value.detach() for name, value in results.items()}


def with_gradients(given: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Copies of the tensors, in another dtype if asked, those that are trained as leaves."""
    copies = {
        name: None if value is None else value.detach().to(dtype or value.dtype, copy=True)
        for name, value in given.items()
    }
    for name in TRAINED:
        if copies[name] is not None and not (name == "y" and copies["base_weight"] is not None):
            copies[name].requires_grad_()
    return copies


def reference(given: dict[str, Tensor | None], case: Case, grads: list[Tensor | None], dtype=None):
    """Outputs and gradients by `by_routing`, in fp64 or another dtype."""
    copies = with_gradients(given, dtype)
    sent = [None if grad is None else grad.to(dtype or grad.dtype) for grad in grads]
    return differentiated(by_routing(copies, case), copies, sent)
