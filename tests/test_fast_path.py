"""The fast path gives what the plain one gives, is taken where it can be, and never where it would be wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging

import methods
import pytest
import tiny
import torch
import torch.autograd.forward_ad as fwAD
from accelerate import cpu_offload
from methods import build, inputs_of
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import molora.rows
import molora.stack
from molora import MoLoraConfig, MoloraError, record_routing
from molora.kernels import dispatch
from molora.kernels.products import product_dtype
from molora.kernels.stacked import GatedUp, StackedDown
from molora.layer import MoLoraLinear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP_2 = {"selection": "top_k", "top_k": 2}
CHOICES = {
    "adaptive threshold": {},
    "threshold": {"selection": "threshold", "threshold": 0.3},
    "top-k": TOP_2,
    "top-p": {"selection": "top_p", "top_p": 0.6},
    "dense": {"selection": "dense"},
    "sigmoid": {"gate": "sigmoid", "selection": "dense", "renormalize": False},
    "sigmoid top-k": {"gate": "sigmoid", **TOP_2},
    "temperature": {"temperature": 0.5, **TOP_2},
    "router with bias": {"router_bias": True, **TOP_2},
    "balancing bias": {"balance_bias_rate": 0.1, **TOP_2},
    "plain LoRA": {"num_experts": 1, "router": "none", "selection": "dense"},
    "rank one": {"r": 1, "num_experts": 6, **TOP_2},
    "unequal ranks": {"r": [1, 3, 2, 5], **TOP_2},
    "shared expert": {"shared_experts": 1, **TOP_2},
    "null experts": {"null_experts": 2, **TOP_2},
    "frozen experts": {"frozen_experts": 2, **TOP_2},
    "one A": {"expert_layout": "shared_A", **TOP_2},
    "bias of experts": {"expert_bias": True, **TOP_2},
    "activation": {"expert_activation": "gelu", **TOP_2},
    "router per input": {"router_sharing": "input", **TOP_2},
    "router per block": {"router_sharing": "block", **TOP_2},
    "shared router weights": {"router_sharing": "weights", **TOP_2},
    "no token selects": {"selection": "threshold", "threshold": 0.99, "renormalize": False},
}
IDS = torch.arange(26).reshape(2, 13) % 90 + 4


def adapted(dtype=torch.float64, base=None, **fields):
    """A tiny model with an adapter that changes its output."""
    torch.manual_seed(0)
    config = {"r": 3, "num_experts": 4, "target_modules": TARGETS, "init_weights": False, **fields}
    return get_peft_model(base or tiny.tiny_llama(), MoLoraConfig(**config)).to(dtype)


def results(model, kernels, monkeypatch, ids=IDS, **inputs):
    """Output and every gradient."""
    monkeypatch.setattr(dispatch, "_asked", kernels)
    model.zero_grad()
    logits = model(input_ids=ids, **inputs).logits
    logits.double().square().mean().backward()
    return {
        "output": logits.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.fixture
def products(monkeypatch):
    """Counts the reads of an input by the fast path."""
    calls = []
    apply = StackedDown.apply
    monkeypatch.setattr(StackedDown, "apply", lambda *given: (calls.append(given), apply(*given))[1])
    return calls


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("choice", CHOICES)
def test_output_and_every_gradient_are_those_of_the_plain_path(choice, monkeypatch, products):
    model = adapted(**CHOICES[choice]).train()
    plain = results(model, "reference", monkeypatch)
    assert not products
    fast = results(model, "auto", monkeypatch)
    assert products
    assert fast.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(fast[name], expected, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("preset", methods.SETTINGS)
def test_every_preset_is_the_same_on_both_paths(preset, monkeypatch):
    model = build(preset).double()
    given = inputs_of(model)
    monkeypatch.setattr(dispatch, "_asked", "reference")
    with torch.no_grad():
        expected = model(input_ids=methods.tokens(), **given).logits
        monkeypatch.setattr(dispatch, "_asked", "auto")
        torch.testing.assert_close(model(input_ids=methods.tokens(), **given).logits, expected, rtol=1e-9, atol=1e-11)


def _by_kind(found, expected):
    """Relative error over all tensors of a kind, the same part of every linear: single numbers are rounded by luck."""
    errors, sizes = {}, {}
    for name, value in expected.items():
        kind = next((part for part in name.split(".") if part.startswith("molora_")), name)
        errors[kind] = errors.get(kind, 0) + (found[name].double() - value).square().sum()
        sizes[kind] = sizes.get(kind, 0) + value.square().sum()
    return {kind: (errors[kind] / sizes[kind]).sqrt() for kind in errors}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("choice", ["adaptive threshold", "top-k", "unequal ranks"])
def test_errors_are_at_most_twice_those_of_the_plain_path(choice, dtypes, autocast, monkeypatch):
    base, adapter = dtypes
    model = adapted(base, **CHOICES[choice]).train()
    for name, parameter in model.named_parameters():
        if "molora_" in name:
            parameter.data = parameter.data.to(adapter)
    exact = results(copy.deepcopy(model).double(), "reference", monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        plain, fast = (_by_kind(results(model, kernels, monkeypatch), exact) for kernels in ("reference", "auto"))
    for kind, error in fast.items():
        assert error <= 2 * plain[kind], (kind, error, plain[kind])


def test_a_processor_without_16_bit_units_multiplies_frozen_weights_in_fp32_too(products):
    if product_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16:
        pytest.skip("this processor has them")
    model = adapted(torch.bfloat16, **TOP_2).train()
    model(input_ids=IDS).logits.float().square().mean().backward()
    assert sum(given[1] is not None for given in products) == 7 * 2


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


def attention_of(**fields):
    """An attention block, and an input behind a graph, as siblings share them."""
    model = adapted(**{**TOP_2, **fields}).train()
    x = torch.randn(2, 5, 32, dtype=torch.float64).requires_grad_()
    return model.base_model.model.model.layers[0].self_attn, x * 1


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


def test_linears_checkpointed_one_by_one_do_not_share():
    attention, x = attention_of()
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    trained = [p for linear in linears for p in linear.parameters() if p.requires_grad]
    expected = torch.autograd.grad(sum(linear(x).square().sum() for linear in linears), trained, retain_graph=True)
    pieces = sum(checkpoint(linear, x, use_reentrant=False).square().sum() for linear in linears)
    for found, plain in zip(torch.autograd.grad(pieces, trained), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


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


def test_frozen_experts_and_routers_keep_no_input():
    frozen = {"freeze_A": True, "freeze_router": True}
    model = adapted(base=nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **frozen, **TOP_2)
    x = torch.randn(9, 6, dtype=torch.float64).requires_grad_() * 1
    y = model.train()(x)
    x.add_(1)  # nobody needs it any more
    y.sum().backward()


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


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("choice", ["adaptive threshold", "router per input"])
def test_gradient_checkpointing_changes_no_gradient(choice, reentrant, monkeypatch):
    if reentrant and choice == "router per input":
        pytest.skip("decisions handed on need non-reentrant checkpointing between layers only")
    model = adapted(**CHOICES[choice]).train()
    plain = results(model, "auto", monkeypatch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = results(model, "auto", monkeypatch)
    for name, expected in plain.items():
        torch.testing.assert_close(again[name], expected, rtol=1e-9, atol=1e-13, msg=name)


def test_only_input_hidden_and_gates_are_kept_for_the_backward_pass(monkeypatch):
    """Bytes per token beside the input and parameters, for one linear."""
    experts, rank, tokens, size = 8, 8, 64, 256
    config = MoLoraConfig(r=rank, num_experts=experts, target_modules=["0"], init_weights=False, **TOP_2)
    model = get_peft_model(nn.Sequential(nn.Linear(size, size)), config)
    x = torch.randn(tokens, size, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {x.untyped_storage().data_ptr()}
    sizes = {}
    for kernels in ("reference", "auto"):
        monkeypatch.setattr(dispatch, "_asked", kernels)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x).sum()
        sizes[kernels] = sum(size for place, size in kept.items() if place not in known) / tokens
    hidden_and_logits = 4 * (experts * rank + experts)
    decisions = 6 * 4 * experts  # probabilities, masks, weights before and after they sum to one
    assert sizes["auto"] <= hidden_and_logits + decisions
    assert sizes["auto"] < 0.6 * sizes["reference"]


def test_nothing_as_wide_as_all_experts_outputs_ever_exists(monkeypatch):
    """The largest tensor of a step is the widest input or output of a linear."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(
                max(
                    (t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)),
                    default=0,
                )
            )
            return result

    config = MoLoraConfig(r=2, num_experts=16, target_modules=["0"], init_weights=False, **TOP_2)
    model = get_peft_model(nn.Sequential(nn.Linear(96, 96)), config)
    with Watch():
        model(torch.randn(128, 96, requires_grad=True)).sum().backward()
    assert max(largest) == 128 * 96


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
def test_few_tokens_without_gradients_get_the_same_output(choice, tokens, monkeypatch):
    model = adapted(**CHOICES[choice]).eval()
    with torch.no_grad():
        monkeypatch.setattr(dispatch, "_asked", "reference")
        expected = model(input_ids=IDS[:1, :tokens]).logits
        monkeypatch.setattr(dispatch, "_asked", "auto")
        torch.testing.assert_close(model(input_ids=IDS[:1, :tokens]).logits, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rank", [1, 3])
def test_one_token_of_a_large_bank_reads_its_own_experts_only(rank, monkeypatch):
    monkeypatch.setattr("molora.few.SPARED_RANKS", 2)
    read = []
    multiply = torch.mv
    monkeypatch.setattr(torch, "mv", lambda matrix, x: (read.append(len(matrix)), multiply(matrix, x))[1])
    model = adapted(r=rank, num_experts=8, **TOP_2).eval()
    with torch.no_grad():
        found = model(input_ids=IDS[:1, :1]).logits
        assert read == [8, rank, rank] * 7 * 2  # a router, and the rows of A of two experts, for every linear
        monkeypatch.setattr(dispatch, "_asked", "reference")
        torch.testing.assert_close(model(input_ids=IDS[:1, :1]).logits, found, rtol=1e-9, atol=1e-11)


MIXED = {
    "as many as rows": ["a", "b", "c", "d"],
    "neighbours": ["a", "a", "b", "b"],
    "apart": ["a", "b", "a", "b"],
    "some without": ["__base__", "b", "__base__", "a"],
    "all without": ["__base__"] * 4,
    "all the same": ["c"] * 4,
}


@functools.cache
def with_four_adapters(choice):
    fields, dtype = CHOICES[choice], torch.float64
    model = adapted(dtype, **fields)
    for name in "abcd":
        own = {"r": 3, "num_experts": 4, "target_modules": TARGETS, "init_weights": False, "lora_alpha": 4, **fields}
        model.add_adapter(name, MoLoraConfig(**own))
    return model.to(dtype).eval()


@pytest.mark.parametrize("names", MIXED)
@pytest.mark.parametrize(
    "choice", ["adaptive threshold", "top-k", "router with bias", "unequal ranks", "balancing bias"]
)
def test_rows_with_adapters_of_their_own_get_what_each_gives_alone(choice, names):
    model, names = with_four_adapters(choice), MIXED[names]
    for ids in (torch.arange(24).reshape(4, 6) + 4, torch.arange(4).reshape(4, 1) + 4):
        with torch.no_grad():
            found = model(input_ids=ids, adapter_names=names).logits
            for row, name in enumerate(names):
                model.set_adapter("default" if name == "__base__" else name)
                with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                    alone = model(input_ids=ids[row : row + 1]).logits
                torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-9, atol=1e-11)


def test_rows_are_routed_together_where_their_adapters_are_alike(monkeypatch):
    calls = []
    mixed = molora.rows.mixed_rows
    monkeypatch.setattr(molora.rows, "mixed_rows", lambda *given: (calls.append(given), mixed(*given))[1])
    model = with_four_adapters("top-k")
    with torch.no_grad():
        model(input_ids=IDS, adapter_names=["a", "b"])
    assert len(calls) == 7 * 2


def generated(model, kernels, monkeypatch, **kwargs):
    monkeypatch.setattr(dispatch, "_asked", kernels)
    return model.generate(input_ids=IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)


@pytest.mark.parametrize("choice", ["adaptive threshold", "top-k", "router per input"])
def test_generated_tokens_are_the_same(choice, monkeypatch):
    model = adapted(torch.float32, **CHOICES[choice]).eval()
    assert torch.equal(generated(model, "auto", monkeypatch), generated(model, "reference", monkeypatch))


# Where the fast path must not be taken, or only in part


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


@pytest.mark.parametrize("position", ["input", "hidden"])
def test_dropout_is_where_it_is_asked_for(position, products, monkeypatch):
    model = adapted(lora_dropout=0.5, dropout_position=position, **TOP_2).train()
    torch.manual_seed(1)
    fast = results(model, "auto", monkeypatch)
    # Dropping the input takes a tensor of its own for each linear; the hidden is dropped after one read.
    assert len(products) == (14 if position == "input" else 4 * 2 + 3)
    torch.manual_seed(1)
    plain = results(model, "reference", monkeypatch)
    if position == "input":
        torch.testing.assert_close(fast["output"], plain["output"], rtol=1e-9, atol=1e-12)
    dropped = (fast["output"] - results(model.eval(), "auto", monkeypatch)["output"]).abs().max()
    assert dropped > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=0, atol=0)


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


def test_recording_changes_no_bit():
    model = adapted(torch.float32, **TOP_2).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with record_routing(model) as records:
            assert torch.equal(model(input_ids=IDS).logits, expected)
    assert len(records) == 7 * 2


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
