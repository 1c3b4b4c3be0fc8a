"""Rows of one batch through different adapters, plain torch and Triton, against a slow fp64 loop over the rows."""

import importlib
from dataclasses import dataclass, replace

import pytest
import torch

from molora.errors import MoloraError
from molora.kernels import multi_adapter
from molora.kernels.adapter_parts import AdapterParts
from molora.kernels.choices import Choices
from molora.kernels.multi_adapter import mixed_rows
from molora.routing.route import RoutingExtras, RoutingSpec, route

TOP_2 = Choices("softmax", "top_k", renormalize=True, top_k=2)
ADAPTIVE = Choices("softmax", "adaptive_threshold", minus_threshold=True, renormalize=True, max_threshold=0.3)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@dataclass(frozen=True)
class Case:
    """A batch: which adapter each row uses, and the sizes of all."""

    index: tuple[int, ...]
    choices: Choices = TOP_2
    tokens: int = 3
    experts: int = 4
    rank: int = 8
    width: int = 48
    out: int = 40
    router_bias: bool = False
    dtype: torch.dtype = torch.float32
    router_dtype: torch.dtype | None = None


CASES = {
    "interleaved rows": Case((0, 1, 0, 2, 1, 0)),
    "rows without an adapter": Case((-1, 1, -1, 0)),
    "no row has an adapter": Case((-1, -1)),
    "one row, one token": Case((1,), tokens=1),
    "decoding": Case((2, 0, 2, -1, 1), tokens=1),
    "all rows the same": Case((1, 1, 1)),
    "several blocks of tokens": Case((0, -1, 0, 1), tokens=70),
    "odd sizes": Case((0, 2, 1), tokens=5, experts=6, rank=3, width=50, out=70),
    "rank-1 experts": Case((0, 1), TOP_2, experts=40, rank=1),
    "one expert": Case((0, 1), Choices("sigmoid", "dense"), experts=1, rank=5),
    "many ranks": Case((1, 0), experts=8, rank=20),
    "dense": Case((0, 1), Choices("softmax", "dense", temperature=0.7)),
    "dense sigmoid": Case((0, 1), Choices("sigmoid", "dense", renormalize=True), router_bias=True),
    "top-k of a sigmoid with bias": Case((0, 1), replace(TOP_2, gate="sigmoid"), router_bias=True),
    "top-p": Case((0, 1, 0), Choices("softmax", "top_p", renormalize=True, top_p=0.6), tokens=9),
    "threshold": Case((0, 1, 0), Choices("softmax", "threshold", threshold=0.3), tokens=9),
    "adaptive threshold": Case((0, 1, 0), ADAPTIVE, tokens=9, router_bias=True),
    "adaptive threshold, decoding": Case((2, 1, 0, 0), ADAPTIVE, tokens=1, experts=16, rank=2),
    "bf16": Case((0, 1, 0), dtype=torch.bfloat16, tokens=9),
    "bf16, fp32 router": Case((0, -1, 1), ADAPTIVE, dtype=torch.bfloat16, router_dtype=torch.float32),
    "bf16, fp32 router, decoding": Case((1, -1, 0), dtype=torch.bfloat16, router_dtype=torch.float32, tokens=1),
    "shared experts": Case((0, -1, 1, 0), replace(TOP_2, shared_experts=2), tokens=9, router_bias=True),
    "shared experts, decoding": Case((2, 0, -1), replace(ADAPTIVE, shared_experts=1), tokens=1, rank=3),
    "many shared experts, decoding": Case((0, 1), replace(TOP_2, shared_experts=30), tokens=1, rank=2),
    "shared experts, several blocks of tokens": Case((1, 0), replace(TOP_2, shared_experts=1), tokens=70, experts=3),
    "fp16, fp32 router": Case((0, 1), dtype=torch.float16, router_dtype=torch.float32, router_bias=True),
}


WHOLE = ("interleaved rows", "rows without an adapter", "odd sizes", "rank-1 experts", "top-p", "bf16, fp32 router")
"""Cases of few tokens that the kernels for many tokens take too."""


def make(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, list[AdapterParts]]:
    """Input, output so far, and three adapters that differ in scale too."""
    routed = case.router_dtype or case.dtype

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return (torch.randn(*shape) * (4 / shape[-1]) ** 0.5).to(dtype).to(device)

    def adapter(number: int) -> AdapterParts:
        ranks = (case.experts + case.choices.shared_experts) * case.rank
        return AdapterParts(
            normal(ranks, case.width),
            normal(case.experts, case.width, dtype=routed),
            normal(case.out, ranks),
            0.5 + number,
            normal(case.experts, dtype=routed) if case.router_bias else None,
            normal(1, case.width, dtype=routed) if case.choices.adaptive else None,
            normal(1, dtype=routed) if case.choices.adaptive and case.router_bias else None,
        )

    rows = len(case.index)
    adapters = [adapter(number) for number in range(3)]
    x = torch.randn(rows, case.tokens, case.width).to(case.dtype).to(device)
    return x, torch.randn(rows, case.tokens, case.out).to(case.dtype).to(device), adapters


def by_row(x, y, case: Case, adapters, dtype: torch.dtype):
    """The definition, a row at a time: products in `dtype`, routing in at least fp32."""
    choices, exact = case.choices, torch.promote_types(dtype, torch.float32)
    weighing = "probability_minus_threshold" if choices.minus_threshold else "probability"
    spec = RoutingSpec(
        choices.gate,
        choices.selection,
        weighing,
        choices.renormalize,
        choices.temperature,
        choices.top_k,
        choices.top_p,
        choices.threshold,
        choices.max_threshold,
        shared_experts=choices.shared_experts,
    )
    y = y.to(dtype)
    for row, number in enumerate(case.index):
        if number < 0:
            continue
        one, tokens = adapters[number], x[row].to(exact)
        logits = tokens @ one.router.to(exact).T + (0 if one.router_bias is None else one.router_bias.to(exact))
        level = None
        if choices.adaptive:
            level = tokens @ one.threshold_row.to(exact).T
            level = level + (0 if one.threshold_bias is None else one.threshold_bias.to(exact))
        weights = route(logits, spec, RoutingExtras(threshold_logit=level)).weights
        hidden = x[row].to(dtype) @ one.a.to(dtype).T
        gated = (hidden * weights.repeat_interleave(case.rank, dim=1) * one.scale).to(dtype)
        y[row] += gated @ one.b.to(dtype).T
    return y


def close(got, x, y, case: Case, adapters):
    """Off by at most twice what plain torch is off by in the same dtype, and a few roundings in fp32."""
    want = by_row(x, y, case, adapters, torch.float64)
    eager = by_row(x, y.clone(), case, adapters, case.dtype)
    allowed = 2 * (eager - want).abs().max().item() + 1e-6 * max(1.0, want.abs().max().item())
    error = (got - want).abs().max().item()
    assert error <= allowed, f"off by {error:.2e}, plain torch by {allowed / 2:.2e}"
    unchanged = [row for row, number in enumerate(case.index) if number < 0]
    assert torch.equal(got[unchanged], y[unchanged])
    if len(unchanged) < len(case.index):
        assert not torch.equal(got, y)


def expect_right(case: Case, backend: str, device: str):
    if backend == "triton" and device == "cpu":
        skip_if_compiled()
    x, y, adapters = make(case, device)
    out = y.clone()
    got = mixed_rows(x, out, list(case.index), adapters, case.choices, backend)
    assert got is out
    close(got, x, y, case, adapters)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_torch_every_row_goes_through_its_own_adapter(case):
    expect_right(case, "torch", "cpu")


@pytest.fixture
def few_tokens(monkeypatch):
    """The kernels for rows of few tokens, which cut even a narrow input into slices."""
    module = importlib.import_module("molora.kernels.triton.few_tokens")
    monkeypatch.setattr(module, "processors", lambda device: 64)
    return module


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_every_row_goes_through_its_own_adapter(case, device, few_tokens):
    expect_right(case, "triton", device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", WHOLE)
def test_triton_so_it_does_by_the_kernels_for_many_tokens(name, device, monkeypatch, few_tokens):
    monkeypatch.setattr(few_tokens, "MOST_TOKENS", 0)
    expect_right(CASES[name], "triton", device)


def test_slices_cover_the_width_and_are_no_more_than_help(few_tokens):
    for width, block, programs in ((4096, 128, 8), (4096, 128, 500), (50, 16, 1), (1, 16, 3), (11008, 64, 20)):
        slices, per_slice = few_tokens.slices_of_width(width, block, programs, torch.device("cpu"))
        assert slices in (1, 2, 4, 8, 16)
        assert per_slice % block == 0
        assert slices * per_slice >= width
        assert slices == 1 or programs * slices < 4 * 64


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_output_that_is_a_view_and_matrices_that_begin_anywhere(backend):
    """As where y is part of a wider output, and where A is a slice of a bank: no 16 bytes are whole."""
    case = CASES["odd sizes"]
    if backend == "triton":
        skip_if_compiled()
    x, y, adapters = make(case, "cpu")
    wide = torch.zeros(3, 5, 2 * case.out)
    wide[..., : case.out] = y
    shifted = []
    for one in adapters:
        bank = torch.cat([torch.zeros(1, case.width), one.a])
        shifted.append(one._replace(a=bank[1:]))
    close(mixed_rows(x, wide[..., : case.out], list(case.index), shifted, case.choices, backend), x, y, case, adapters)
    assert not wide[..., case.out :].any()


@pytest.mark.parametrize("name", ["interleaved rows", "adaptive threshold", "bf16, fp32 router"])
def test_matrices_that_are_kept_stacked_are_the_same(name):
    case = CASES[name]
    x, y, adapters = make(case, "cpu")
    stacked = []
    for one in adapters:
        parts = [part.float() for part in (one.a, one.router, one.threshold_row) if part is not None]
        stacked.append(one._replace(stacked=torch.cat(parts)))
    close(mixed_rows(x, y.clone(), list(case.index), stacked, case.choices, "torch"), x, y, case, adapters)


def test_torch_scattered_rows_of_many_tokens_are_not_copied(monkeypatch):
    """Rows of many tokens are products of their own, and the result is the same."""
    monkeypatch.setattr(multi_adapter, "FEW_TOKENS", 2)
    for name in ("interleaved rows", "rows without an adapter", "decoding"):
        expect_right(CASES[name], "torch", "cpu")
    pieces = multi_adapter._pieces((0, 1, 0, 0), False, torch.device("cpu"))
    assert [(piece.adapter, piece.rows) for piece in pieces] == [(0, slice(0, 1)), (0, slice(2, 4)), (1, slice(1, 2))]


def test_triton_adapters_are_found_by_address_not_by_what_was_there_before(few_tokens):
    """A step of training between two calls changes matrices in place, and a reload replaces them."""
    skip_if_compiled()
    case = CASES["one row, one token"]
    x, y, adapters = make(case, "cpu")
    mixed_rows(x, y.clone(), [1], adapters, case.choices, "triton")
    adapters[1].b.mul_(3)
    close(mixed_rows(x, y.clone(), [1], adapters, case.choices, "triton"), x, y, case, adapters)
    adapters[1] = adapters[1]._replace(b=torch.randn_like(adapters[1].b), scale=7.0)
    close(mixed_rows(x, y.clone(), [1], adapters, case.choices, "triton"), x, y, case, adapters)


REFUSED = {
    "index out of range": ({"index": [0, 3, 1]}, "3 adapters, or -1"),
    "an index too few": ({"index": [0, 1]}, "one adapter for each"),
    "an adapter of another shape": ({"b": torch.zeros(41, 32)}, "same E, r, in and out"),
    "no threshold row": ({"choices": ADAPTIVE}, "threshold_row"),
    "a gradient": ({"a": torch.zeros(32, 48, requires_grad=True)}, "no backward pass"),
    "another dtype of the router": ({"router": torch.zeros(4, 48, dtype=torch.bfloat16)}, "one dtype of all"),
    "a matrix with gaps": ({"a": torch.zeros(32, 96)[:, ::2]}, "contiguous"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_computed_is_refused_before_y_changes(change, message):
    case = Case((0, 1, 2))
    x, y, adapters = make(case, "cpu")
    matrices = {name: value for name, value in change.items() if isinstance(value, torch.Tensor)}
    adapters[1] = adapters[1]._replace(**matrices)
    out = y.clone()
    with pytest.raises(MoloraError, match=message):
        mixed_rows(x, out, change.get("index", [0, 1, 2]), adapters, change.get("choices", TOP_2), "triton")
    assert torch.equal(out, y)


def skip_if_compiled():
    if not importlib.import_module("molora.kernels.triton.common").INTERPRETED:
        pytest.skip("kernels are compiled and take no CPU tensors")
