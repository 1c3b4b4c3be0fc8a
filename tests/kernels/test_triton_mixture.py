from dataclasses import replace

import pytest
import torch
from kernels.cases import (
    ADAMOLE,
    CASES,
    DEVICES,
    HAS_GPU,
    TOP_2,
    Case,
    differentiated,
    incoming,
    reference,
    tensors_of,
    with_gradients,
)

from molora.kernels.choices import Choices
from molora.kernels.fused import mixture

pytest.importorskip("triton")

from molora.kernels import triton as kernels
from molora.kernels.triton.weight_gradient import launch_down_gradient, launch_up_gradient

FP16 = ("top 2 of 8, rank 8, odd sizes", "adaptive, minus threshold")
DTYPES = [
    (name, dtype)
    for name in CASES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if dtype != torch.float16 or name in FP16
]


def fused(given, case, grads, backend):
    copies = with_gradients(given)
    inputs = {name: value for name, value in copies.items() if name != "base_weight"}
    # In place: a leaf that needs a gradient cannot be written to.
    inputs["y"] = inputs["y"] * 1
    out = mixture(**inputs, scale=case.scale, choices=case.choices, base_weight=copies["base_weight"], backend=backend)
    return differentiated(out, copies, grads)


EXACT = ("logits", "threshold_logit", "weights")


def slack(key, value, case, dtype):
    """Relative: what sums over the width in fp32 may lose; to those of 16-bit values a small part of their rounding.

    Torch adds up in blocks and so loses less than the root of what it adds. Tensor cores, which multiply 16 bits, cut
    sums off after every 16 products instead of rounding them. A single number may be right by luck in either, so it
    has one rounding.
    """
    cuts = case.width / 16 if dtype != torch.float32 else 0
    summed = max(3e-7, 2.0**-24 * max(case.width**0.5, cuts))
    return summed if key in EXACT else max(summed, torch.finfo(dtype).eps / (32 if value.numel() > 1 else 1))


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in DTYPES])
def test_outputs_and_gradients_err_at_most_twice_as_much_as_torch_does(name, dtype, device):
    compare(CASES[name], dtype, device)


def compare(case, dtype, device):
    given, grads = tensors_of(case, dtype, device), incoming(case, dtype, device)
    exact = reference(given, case, grads, torch.float64)
    eager = reference(given, case, grads)
    found = fused(given, case, grads, "triton")
    assert found.keys() == exact.keys()
    for key, value in found.items():
        assert value.dtype == eager[key].dtype
        allowed = 2 * rms(eager[key].double() - exact[key]) + slack(key, value, case, dtype) * rms(exact[key])
        assert rms(value.double() - exact[key]) <= allowed, key


REAL = {
    f"{experts} experts of rank {rank}, {tokens} tokens, {choices.selection}": Case(
        choices, experts, rank, tokens, 1024, 1536, base_weight=True, aux=True
    )
    for experts, rank in ((8, 8), (8, 16), (16, 16), (64, 1), (3, 200))
    for tokens in (1, 777)
    for choices in (TOP_2, replace(ADAMOLE, max_threshold=1 / experts))
}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REAL)
def test_sizes_of_real_layers_err_at_most_twice_as_much_as_torch_does(name, dtype):
    compare(REAL[name], dtype, "cuda")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_experts_closer_than_16_bits_resolve_are_told_apart(dtype, device):
    case = Case(Choices("softmax", "top_k", top_k=1), 4, 4, 32, 64, 16)
    given = tensors_of(case, dtype, device)
    given["router"] = given["router"].float()
    given["router"][1:] = given["router"][0]
    given["router"][2] += 2.0**-17 * given["x"][0].float().sign()
    out = mixture(**{**given, "y": given["y"].clone()}, scale=1.0, choices=case.choices, backend="triton")
    wanted = (given["x"].double() @ given["router"].double().t()).argmax(dim=-1)
    told = (given["x"].double() @ (given["router"][2] - given["router"][0]).double()).abs() > 1e-5
    assert told[0]
    assert torch.equal(out.weights.argmax(dim=-1)[told], wanted[told])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_of_equal_experts_exactly_the_first_k_are_kept(kept, backend, device):
    case = Case(Choices("softmax", "top_k", top_k=kept), 5, 2)
    given = tensors_of(case, torch.float32, device)
    given["router"].zero_()
    out = mixture(**given, scale=1.0, choices=case.choices, backend=backend)
    assert torch.equal(out.weights != 0, (torch.arange(5, device=device) < kept).expand(case.tokens, 5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_tell_what_was_selected_even_where_a_probability_is_zero(backend, device):
    case = Case(Choices("softmax", "dense"), 4, 2, router_bias=True)
    given = tensors_of(case, torch.float32, device)
    given["router_bias"][1] = -1e4
    out = mixture(**given, scale=1.0, choices=case.choices, backend=backend)
    assert (out.weights != 0).all()
    assert (out.weights[:, 1] < 1e-37).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("selection", ["dense", "top_k", "top_p", "threshold"])
def test_a_broken_token_stays_visible_and_alone(selection, device):
    case = Case(Choices("softmax", selection, top_k=2, top_p=0.5, threshold=0.9))
    given = tensors_of(case, torch.float32, device)
    given["x"][3, 0] = torch.nan
    out = mixture(**given, scale=1.0, choices=case.choices, backend="triton")
    assert out.y[3].isnan().all()
    assert out.y.isnan().sum() == out.y.shape[1]


@pytest.mark.parametrize("device", DEVICES)
def test_columns_of_experts_without_tokens_are_not_read(device):
    case = Case(TOP_2, 4, 16, only_first=2, router_bias=True)
    given = tensors_of(case, torch.float32, device)
    given["b"][:, 32:] = torch.nan
    out = mixture(**given, scale=1.0, choices=case.choices, backend="triton")
    assert out.y.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_have_the_same_bits_twice(dtype, device):
    torch.manual_seed(0)
    tokens, experts, rank, width = 4096 if device == "cuda" else 300, 4, 4, 40
    x, gy = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    packed = torch.randn(tokens, 24, device=device).to(dtype)
    exact, weights = (torch.randn(tokens, experts, device=device) for _ in range(2))
    h = packed[:, : experts * rank].contiguous()
    down = [launch_down_gradient(packed, exact, x, experts * rank, experts) for _ in range(2)]
    up = [launch_up_gradient(h, weights, gy, 0.5) for _ in range(2)]
    assert torch.equal(down[0], down[1])
    assert torch.equal(up[0], up[1])
    wanted = torch.cat([h.double(), exact.double()], dim=-1).t() @ x.double()
    torch.testing.assert_close(down[0].double(), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_and_widths_need_not_be_contiguous(device):
    case = CASES["adaptive, minus threshold"]
    given, grads = tensors_of(case, torch.float32, device), incoming(case, torch.float32, device)
    wanted = fused(given, case, grads, "triton")
    strided = {
        name: value.t().contiguous().t() if value is not None and value.ndim == 2 else value
        for name, value in given.items()
    }
    found = fused(strided, case, [grad if grad is None else grad.t().contiguous().t() for grad in grads], "triton")
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("device", DEVICES)
def test_y_is_written_in_place_only_if_asked(device):
    case = CASES["top 2 of 8, rank 8, odd sizes"]
    given = {**tensors_of(case, torch.float32, device)}
    del given["base_weight"]
    y = given.pop("y")
    x, a, router, b, *rest = given.values()
    before = y.clone()
    out = kernels.mixture_forward(x, y, a, router, b, *rest, 1.0, case.choices, False)
    assert torch.equal(y, before)
    assert kernels.mixture_forward(x, y, a, router, b, *rest, 1.0, case.choices, True).y is y
    assert torch.equal(y, out.y)
