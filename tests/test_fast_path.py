"""The fast path gives what the plain one gives, with little kept and nothing large."""

from __future__ import annotations

import copy

import methods
import pytest
import torch
from fast_path import CHOICES, IDS, TOP_2, adapted, results
from methods import build, inputs_of
from peft import get_peft_model
from torch import nn

from molora import MoLoraConfig
from molora.kernels import dispatch
from molora.kernels.products import product_dtype


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


def test_frozen_experts_and_routers_keep_no_input():
    frozen = {"freeze_A": True, "freeze_router": True}
    model = adapted(base=nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], **frozen, **TOP_2)
    x = torch.randn(9, 6, dtype=torch.float64).requires_grad_() * 1
    y = model.train()(x)
    x.add_(1)  # nobody needs it any more
    y.sum().backward()


@pytest.mark.parametrize(
    ("choice", "reentrant"),
    [("adaptive threshold", False), ("adaptive threshold", True), ("router per input", False)],
)
def test_gradient_checkpointing_changes_no_gradient(choice, reentrant, monkeypatch):
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
