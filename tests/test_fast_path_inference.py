"""Few tokens, single tokens and rows of different adapters, without gradients."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from fast_path import CHOICES, IDS, TARGETS, TOP_2, adapted, draw_biases

import molora.rows
import molora.stack
from molora import MoLoraConfig, record_routing
from molora.kernels import dispatch


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


ROUTED = {
    "raw": {},
    "balanced": {"balance_bias_rate": 0.1},
    "standardised, balanced": {"router_norm": "standardize", "router_bias": True, "balance_bias_rate": 0.1},
}


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("routed", ROUTED)
def test_one_token_of_a_large_bank_reads_its_own_experts_only(routed, rank, shared, monkeypatch):
    monkeypatch.setattr("molora.few.SPARED_RANKS", 2)
    read = []
    multiply = torch.mv
    monkeypatch.setattr(torch, "mv", lambda matrix, x: (read.append(len(matrix)), multiply(matrix, x))[1])
    model = adapted(r=rank, num_experts=8, shared_experts=shared, **ROUTED[routed], **TOP_2).eval()
    with torch.no_grad():
        found = model(input_ids=IDS[:1, :1]).logits
        # The rows of A of the shared and of two other experts, for every linear.
        assert read == [*([shared * rank] if shared else []), rank, rank] * 7 * 2
        with record_routing(model) as records:
            assert torch.equal(model(input_ids=IDS[:1, :1]).logits, found)
        assert {record.routing.weights.shape[-1] for record in records} == {8 + shared}
        assert all(record.routing.selected.sum() == 2 for record in records)
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
    draw_biases(model)
    return model.to(dtype).eval()


@pytest.mark.parametrize("names", MIXED)
@pytest.mark.parametrize(
    "choice", ["adaptive threshold", "top-k", "router with bias", "unequal ranks", "balancing bias", "shared expert"]
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


def test_recording_changes_no_bit():
    model = adapted(torch.float32, **TOP_2).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with record_routing(model) as records:
            assert torch.equal(model(input_ids=IDS).logits, expected)
    assert len(records) == 7 * 2
