"""Linears that read the same input read it once, and only where the others see the very same."""

from __future__ import annotations

import pytest
import tiny
import torch
from fast_path import IDS, TOP_2, adapted, attention_of, results
from torch import nn
from torch.utils.checkpoint import checkpoint

from molora import MoloraError
from molora.kernels import dispatch


def _another_tensor(attention, x):
    return torch.ones_like(x) * x.detach()[0, 0]


def _changed_tensor(attention, x):
    return x.mul_(2)


def _changed_weight(attention, x):
    with torch.no_grad():
        attention.k_proj.molora_A["default"].weight.mul_(3)
    return x


def _changed_router(attention, x):
    with torch.no_grad():
        attention.k_proj.molora_router["default"].weight.neg_()
    return x


def _hook_that_brings_weights(attention, x):
    def bring(module, given):
        module.molora_A["default"].weight.data = torch.ones_like(module.molora_A["default"].weight)

    attention.k_proj.register_forward_pre_hook(bring)
    attention.q_proj(x)
    return x


CHANGES = [_another_tensor, _changed_tensor, _changed_weight, _changed_router, _hook_that_brings_weights]


def test_linears_that_read_the_same_input_read_it_once(products):
    model = adapted(**TOP_2).train()
    model(input_ids=IDS)
    read = [given[3].downs for given in products if given[3].products is None]
    assert read == [3, 1, 2, 1] * 2  # q, k and v; o; gate and up; down


def test_rank_and_router_rows_of_siblings_may_differ(monkeypatch, products):
    model = adapted(rank_pattern={"k_proj": 1, "up_proj": 5}, **TOP_2).train()
    fast, plain = (results(model, kernels, monkeypatch) for kernels in ("auto", "reference"))
    assert len(products) == 4 * 2 + 3  # of the first layer q, k and v get nodes of their own
    for name, expected in plain.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-9, atol=1e-13, msg=name)


@pytest.mark.parametrize("change", CHANGES)
def test_siblings_compute_for_themselves_what_changed_since(change):
    attention, x = attention_of()
    attention.q_proj(x)
    x = change(attention, x)
    found = attention.k_proj(x)
    with dispatch.using("reference"):
        torch.testing.assert_close(found, attention.k_proj(x), rtol=1e-9, atol=1e-11)


def test_siblings_keep_to_their_own_mode():
    attention, x = attention_of()
    attention.q_proj(x)
    with torch.no_grad():
        assert not attention.k_proj(x).requires_grad
    with torch.inference_mode():
        given = torch.randn(70, 32, dtype=torch.float64)
        attention.q_proj(given)
        given.mul_(2)
        found = attention.k_proj(given)
        with dispatch.using("reference"):
            torch.testing.assert_close(found, attention.k_proj(given), rtol=1e-9, atol=1e-11)


def test_siblings_that_do_not_run_get_no_gradient():
    attention, x = attention_of()
    attention.q_proj(x).sum().backward()
    assert attention.q_proj.molora_A["default"].weight.grad is not None
    for idle in (attention.k_proj, attention.v_proj):
        assert all(parameter.grad is None for parameter in idle.parameters())


def test_backward_passes_of_siblings_may_come_one_by_one():
    attention, x = attention_of()
    x = x.detach()
    query, key = attention.q_proj(x), attention.k_proj(x)
    query.sum().backward()
    key.sum().backward()
    assert attention.k_proj.molora_A["default"].weight.grad.abs().max() > 0


class _Zeros(nn.Module):
    def forward(self, x):
        return torch.zeros(*x.shape[:-1], 16, dtype=x.dtype)


def test_parts_that_nobody_takes_end_with_the_call():
    model = adapted(**TOP_2).train()
    attention = model.base_model.model.model.layers[1].self_attn
    attention.k_proj = attention.v_proj = _Zeros()  # the modules themselves are still siblings of q
    shared, seen = attention.q_proj.molora_input["default"], []
    attention.q_proj.register_forward_hook(lambda module, given, output: seen.append(shared._kept))
    model(input_ids=IDS)
    assert seen[0] is not None
    assert shared._kept is None


def test_linears_checkpointed_one_by_one_do_not_share():
    attention, x = attention_of()
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    trained = [p for linear in linears for p in linear.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(linear(x).square().sum() for linear in linears), trained, retain_graph=True)
    pieces = sum(checkpoint(linear, x, use_reentrant=False).square().sum() for linear in linears)
    for found, plain in zip(torch.autograd.grad(pieces, trained), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


def test_a_decision_about_other_tokens_is_refused():
    attention, x = attention_of(router_sharing="input")
    attention.q_proj(x)
    with pytest.raises(MoloraError, match=r"shape \[2, 5\].*\[2, 3\].*router_sharing='none'"):
        attention.k_proj(x[:, :3])


def test_queries_of_cross_attention_do_not_multiply_for_keys(products):
    model = adapted(base=tiny.tiny_t5(), target_modules=["q", "k", "v"], **TOP_2).train()
    model(input_ids=IDS, decoder_input_ids=IDS[:, :5])
    sizes = [given[3].downs for given in products if given[3].products is None]
    assert sorted(sizes) == sorted([3] * 2 + [3, 1, 2] * 2)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,), (2, 3, 4, 32)])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("sharing", ["none", "input"])
def test_inputs_of_any_shape(shape, grad, sharing):
    attention, _ = attention_of(router_sharing=sharing)
    x, found = torch.randn(shape, dtype=torch.float64), {}
    for kernels in ("reference", "auto"):
        with dispatch.using(kernels), torch.set_grad_enabled(grad):
            given = (x.clone().requires_grad_() * 1) if grad else x
            found[kernels] = [attention.q_proj(given), attention.k_proj(given)]
            if grad:
                sum(y.square().sum() for y in found[kernels]).backward()
    for fast, plain in zip(found["auto"], found["reference"], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-11)
