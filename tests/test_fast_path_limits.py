"""Where the fast path must not be taken, or only in part."""

from __future__ import annotations

import copy
import functools
import logging

import pytest
import tiny
import torch
import torch.autograd.forward_ad as fwAD
from accelerate import cpu_offload
from fast_path import IDS, TARGETS, TOP_2, adapted, results
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import molora.rows
import molora.stack
from molora import MoLoraConfig, MoloraError
from molora.kernels import dispatch
from molora.kernels.stacked import GatedUp
from molora.layer import MoLoraLinear


def _mm_is_kept(context, operation, *args, **kwargs):
    kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("bias", [False, True])
def test_selective_checkpointing_changes_no_gradient(bias):
    base = nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=bias), "k_proj": nn.Linear(8, 8, bias=bias)})
    model = adapted(base=base, target_modules=["q_proj", "k_proj"], **TOP_2).train().base_model.model

    def run(x):
        return model["q_proj"](x).tanh() * model["k_proj"](x)

    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(run(x * 1).square().sum(), x)
    contexts = functools.partial(create_selective_checkpoint_contexts, _mm_is_kept)
    found = checkpoint(run, x * 1, use_reentrant=False, context_fn=contexts).square().sum()
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], expected)


@pytest.mark.parametrize("consume", [lambda y: y.mul_(2), lambda y: y.relu_(), lambda y: y[:, 0].zero_()])
@pytest.mark.parametrize("plain", [True, False])
def test_outputs_may_be_written_into(consume, plain):
    model = adapted(base=nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **TOP_2).train()
    layer = model.base_model.model[0]
    if not plain:
        layer.base_layer.register_forward_hook(lambda module, given, output: output.mT.contiguous().mT)
    y = layer(torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True) * 1)
    consume(y)
    y.sum().backward()


def test_biases_in_fp32_beside_16_bit_weights_under_autocast(monkeypatch):
    model = adapted(torch.bfloat16, base=tiny.tiny_qwen2(), **TOP_2).train()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "molora_" in name:
            parameter.data = parameter.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        results(model, "auto", monkeypatch)


def test_autocast_leaves_fp64_alone():
    model = adapted(base=nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **TOP_2).train()
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)


class _Kind(torch.Tensor):
    pass


def test_kinds_of_tensors_and_transforms_go_the_plain_way(products):
    model = adapted(base=nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], selection="dense").train()
    x = torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x.as_subclass(_Kind)).as_subclass(torch.Tensor), model(x))
    products.clear()
    with fwAD.dual_level():
        assert fwAD.unpack_dual(model(fwAD.make_dual(x, torch.ones_like(x)))).tangent is not None
    assert not products


def _hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda module, given, output: output + 1)


def _trained_bias(layer):
    layer.base_layer.bias = nn.Parameter(torch.randn(layer.out_features, dtype=torch.float64))


def _hook_on_bank(layer):
    layer.molora_A["default"].register_forward_hook(lambda module, given, output: 2 * output)


def _hook_on_router(layer):
    layer.molora_router["default"].register_forward_hook(lambda module, given, output: 2 * output)


@pytest.mark.parametrize("change", [_hook_on_base, _trained_bias, _hook_on_bank, _hook_on_router])
def test_hooks_and_trained_biases_of_parts_count(change, monkeypatch):
    model = adapted(**TOP_2).train()
    for layer in model.modules():
        if isinstance(layer, MoLoraLinear):
            change(layer)
    fast, plain = (results(model, kernels, monkeypatch) for kernels in ("auto", "reference"))
    assert fast.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-9, atol=1e-13, msg=name)


def test_an_offloaded_bank_is_called_not_read(products):
    model = adapted(**TOP_2).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        products.clear()
        cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-9, atol=1e-11)
    assert not products


def test_per_sample_gradients_go_the_plain_way():
    model = adapted(target_modules=["0"], base=nn.Sequential(nn.Linear(6, 5)), **TOP_2).train()
    x = torch.randn(3, 6, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(x)
    one = torch.autograd.functional.jacobian(lambda row: model(row.unsqueeze(0))[0], x[1])
    torch.testing.assert_close(jacobian[1], one)


def test_gradients_of_gradients_are_refused_not_wrong():
    model = adapted(target_modules=["0"], base=nn.Sequential(nn.Linear(6, 5)), **TOP_2).train()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_two_active_adapters_go_the_plain_way(products, monkeypatch):
    model = adapted(**TOP_2)
    model.add_adapter("other", MoLoraConfig(r=2, num_experts=2, target_modules=TARGETS, init_weights=False))
    model = model.double().eval()
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        model(input_ids=IDS)
    assert not products


def test_an_unknown_backend_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(dispatch, "_asked", None)
    monkeypatch.setenv("MOLORA_KERNELS", "tritn")
    with pytest.raises(MoloraError, match=r"MOLORA_KERNELS.*'tritn'.*'reference'.*Did you mean 'triton'"):
        adapted(**TOP_2)(input_ids=IDS)


def test_what_runs_is_said_once(monkeypatch, caplog):
    dispatch.say.cache_clear()
    model = adapted(torch.float32, **TOP_2).eval()
    with caplog.at_level(logging.INFO, "molora.kernels"), torch.no_grad():
        for _ in range(2):
            model(input_ids=IDS)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "'torch'" in said[0]


def test_a_copied_model_computes_for_itself():
    model = adapted(**TOP_2).train()
    model(input_ids=IDS)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert copied(input_ids=IDS).logits.abs().max() > 0
    assert GatedUp is molora.stack.GatedUp
