"""What calibration sees of an adapter, and what slimming is said to cost, against slow sums."""

from __future__ import annotations

import math

import pytest
import torch
from methods import config_of, layers_of, tokens
from slimming import TARGETS, batch_of, build, logits_of, saved
from tiny import tiny_llama

from molora import DataError, MoloraError, record_routing
from molora.compose import compose
from molora.slim import expert_usage, output_errors, quality, rerank, write_adapter
from molora.slim.prune import most_energy

SEEN = {
    "top-k": ("molora", {"selection": "top_k", "top_k": 2}),
    "siblings": ("molora", {"selection": "top_k", "top_k": 2, "router_sharing": "input"}),
    "shared experts": ("molora", {"shared_experts": 1, "r": [2, 1, 3, 2, 2], "num_experts": 4}),
    "null experts": ("adamoe", {}),
    "shared A": ("hydralora", {}),
    "activation": ("molora", {"expert_activation": "silu", "expert_bias": True}),
    "by sequence": ("mocle", {}),
    "constant": ("static", {}),
}


def padded_batch(model):
    """Three rows, two of them with padding."""
    batch = batch_of(model, tokens())
    batch["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


@pytest.mark.parametrize("case", SEEN)
def test_usage_is_what_a_slow_loop_counts(case):
    preset, overrides = SEEN[case]
    model = build(preset, **overrides)
    batch, layers, seen = padded_batch(model), layers_of(model), {}
    note = [layer.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]})) for layer in layers.values()]
    found = expert_usage(model, [batch, batch])
    for hook in note:
        hook.remove()
    real = batch["attention_mask"].bool().reshape(-1)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad(), record_routing(model) as records:
        model(**inputs)
    decided = {record.layer: record.routing for record in records}
    for name, layer in layers.items():
        plan, usage = layer.molora_plan["default"], found[layer.module_key]
        group = layer.molora_group.get("default")
        leader = name if group is None else next(n for n, one in layers.items() if one is group.leader)
        if leader in decided:
            weights = decided[leader].weights.expand(3, 6, -1).reshape(18, -1)[real].double()
        else:
            constant = layer.molora_router["default"].weight.detach().softmax(0).double()
            weights = constant.expand(int(real.sum()), -1)
        assert usage.tokens == 2 * real.sum()
        torch.testing.assert_close(usage.selected, 2 * (weights != 0).sum(0).double())
        torch.testing.assert_close(usage.mean_weight, weights.mean(0), rtol=1e-5, atol=1e-7)
        with torch.no_grad():
            hidden = layer.hidden("default", seen[layer]).flatten(0, 1)[real].double()
        hidden = torch.nn.functional.silu(hidden) if plan.activation else hidden
        if plan.layout == "shared_A":
            hidden = hidden.repeat(1, plan.bank_experts)
        of_rank = [expert for expert, rank in enumerate(plan.ranks) for _ in range(rank)]
        gate = torch.stack([weights[:, expert] * plan.scales[expert] for expert in of_rank], dim=1)
        torch.testing.assert_close(usage.energy, 2 * (gate * hidden).square().sum(0), rtol=1e-4, atol=1e-7)


def test_sums_do_not_depend_on_how_rows_are_batched_and_the_mode_comes_back():
    model = build("molora", selection="top_k", top_k=2, lora_dropout=0.5).train()
    batch = batch_of(model, tokens())
    whole = expert_usage(model, [batch], moments=True)
    single = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    rows = expert_usage(model, single, moments=True)
    assert model.training
    for module, one in whole.items():
        for name in ("selected", "weight", "energy", "probability", "products", "hidden"):
            torch.testing.assert_close(getattr(rows[module], name), getattr(one, name), rtol=1e-4, atol=1e-6)
        correlation = one.correlation()
        torch.testing.assert_close(correlation, correlation.T)
        torch.testing.assert_close(correlation.diagonal(), torch.ones(len(correlation), dtype=torch.float64))


def test_correlations_are_those_of_the_probabilities():
    model = build("molora", selection="top_k", top_k=1, renormalize=False)
    found = expert_usage(model, [batch_of(model, tokens())])
    with torch.no_grad(), record_routing(model) as records:
        model(input_ids=tokens())
    for record in records:
        expected = torch.corrcoef(record.routing.probabilities.flatten(0, 1).double().T)
        module = record.layer.removeprefix("base_model.model.")
        torch.testing.assert_close(found[module].correlation(), expected, rtol=1e-4, atol=1e-5)


def test_imported_experts_without_rank_somewhere_are_counted_too(folders):
    model = compose(tiny_llama(), folders, top_k=2).eval()
    found = expert_usage(model, [batch_of(model, tokens())])
    for layer in layers_of(model).values():
        usage = found[layer.module_key]
        assert len(usage.energy) == sum(layer.molora_plan["default"].ranks)
        assert usage.selected.sum() == 2 * 18


def test_an_adapted_output_layer_is_seen_at_every_token():
    model = build("molora", target_modules=["q_proj", "lm_head"])
    found = expert_usage(model, [batch_of(model, tokens())])
    assert {module: one.tokens for module, one in found.items()} == dict.fromkeys(found, 18)
    assert any(module.endswith("lm_head") for module in found)


def test_what_is_summed_up_of_inputs_does_not_grow_with_their_size():
    model = build("molora", num_experts=4, r=2)
    found = expert_usage(model, [batch_of(model, tokens())], moments=True)
    assert {tuple(one.hidden.shape) for one in found.values()} == {(8, 8)}


def test_an_adapter_that_is_not_active_is_no_lack_of_data():
    model = build("molora")
    batch = batch_of(model, tokens())
    model.add_adapter("other", config_of("molora", target_modules=TARGETS))
    with pytest.raises(MoloraError, match=r"'other' is not active.*active: default"):
        expert_usage(model, [batch], "other")
    with model.disable_adapter(), pytest.raises(MoloraError, match="active: none"):
        expert_usage(model, [batch])


def test_without_a_token_there_is_nothing_to_say():
    with pytest.raises(DataError, match="give at least one row"):
        expert_usage(build("molora"), [])


@pytest.mark.parametrize(
    ("energies", "share", "kept"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.7, [0, 2]),
        ([4.0, 1.0, 3.0, 2.0], 0.71, [0, 2, 3]),
        ([4.0, 1.0, 0.0, 2.0], 1.0, [0, 1, 3]),
        ([0.0, 0.0], 0.5, [0]),
        ([0.0, 0.0], 1.0, [0]),
        ([5.0], 0.01, [0]),
        ([], 0.5, []),
    ],
)
def test_the_fewest_ranks_with_most_of_the_energy(energies, share, kept):
    assert most_energy(torch.tensor(energies, dtype=torch.float64), share) == kept


@pytest.mark.parametrize("case", ["top-k", "siblings", "shared experts", "null experts", "shared A"])
def test_errors_and_divergence_of_a_smaller_adapter(case, tmp_path):
    preset, overrides = SEEN[case]
    model = build(preset, **overrides)
    batch, adapter = padded_batch(model), saved(model, tmp_path / "adapter")
    (tmp_path / "same").mkdir()
    write_adapter(adapter, tmp_path / "same")
    model.load_adapter(tmp_path / "same", "same")
    errors = output_errors(model, [batch], "default", "same")
    assert set(errors) == set(adapter.modules)
    assert all(error == pytest.approx(0, abs=1e-10) for error in errors.values())
    found = quality(model, [batch], "default", "same")
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.perplexity_after == pytest.approx(found.perplexity_before)
    assert found.tokens == 5 + 3
    assert model.active_adapters == ["default"]


def test_the_error_of_a_module_is_that_of_what_it_adds(tmp_path):
    model = build("molora", r=3)
    batch, adapter = padded_batch(model), saved(model, tmp_path / "adapter")
    first, *_, last = adapter.modules
    tensors = dict(adapter.tensors)
    tensors[f"base_model.model.{first}.molora_B.weight"] = torch.zeros_like(adapter.tensor(first, "molora_B.weight"))
    tensors[f"base_model.model.{last}.molora_B.weight"] = 0.5 * adapter.tensor(last, "molora_B.weight")
    (tmp_path / "other").mkdir()
    write_adapter(type(adapter)(adapter.config, tensors), tmp_path / "other")
    model.load_adapter(tmp_path / "other", "other")
    errors = output_errors(model, [batch], "default", "other")
    assert errors.pop(first) == pytest.approx(1.0)
    assert errors.pop(last) == pytest.approx(0.25)
    assert all(error == 0 for error in errors.values())
    found = quality(model, [batch], "default", "other")
    labels = batch["labels"][:, 1:]
    before = logits_of(model, tokens())[:, :-1][labels != -100].log_softmax(-1).double()
    model.set_adapter("other")
    after = logits_of(model, tokens())[:, :-1][labels != -100].log_softmax(-1).double()
    assert found.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    picked = after.gather(1, labels[labels != -100].unsqueeze(1))
    assert found.perplexity_after == pytest.approx(math.exp(-float(picked.mean())), rel=1e-4)


def test_a_second_moment_makes_the_lower_rank_cost_less(tmp_path):
    model = build("molora", r=4, num_experts=2)
    batch, adapter = batch_of(model, tokens()), saved(model, tmp_path / "adapter")
    usage = expert_usage(model, [batch], moments=True)
    costs = {}
    for name, given in (("plain", None), ("seen", usage)):
        (tmp_path / name).mkdir()
        write_adapter(rerank(adapter, 2, given).adapter, tmp_path / name)
        model.load_adapter(tmp_path / name, name)
        costs[name] = sum(output_errors(model, [batch], "default", name).values())
    assert costs["seen"] < 0.8 * costs["plain"]
