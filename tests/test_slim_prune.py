"""Experts that no token selects go, module by module, and nothing changes; the rest trains and merges on."""

from __future__ import annotations

import pytest
import torch
from methods import layers_of, tokens
from slimming import CLOSE, EXACT, batch_of, build, few_tokens, logits_of, reloaded, saved
from tiny import tiny_llama

from molora.compose import compose
from molora.slim import expert_usage, prune_experts, prune_ranks

TOP_1 = {"selection": "top_k", "top_k": 1, "renormalize": False, "weights": "probability", "num_experts": 5}
UNUSED = {
    "linear": ("molora", {**TOP_1}),
    "a selected softmax": ("molora", {**TOP_1, "weights": "selected_softmax", "top_k": 1, "freeze_router": True}),
    "cosine": ("molora", {**TOP_1, "router": "cosine", "router_dim": 4}),
    "mlp": ("molora", {**TOP_1, "router": "mlp", "router_dim": 4}),
    "sigmoid": ("molora", {**TOP_1, "gate": "sigmoid"}),
    "shared experts": ("molora", {**TOP_1, "shared_experts": 1}),
    "null experts": ("molora", {**TOP_1, "null_experts": 2}),
    "frozen experts": ("molora", {**TOP_1, "frozen_experts": 3}),
    "unequal ranks": ("molora", {**TOP_1, "r": [2, 1, 3, 2, 1]}),
    "activation and bias": ("molora", {**TOP_1, "expert_activation": "gelu", "expert_bias": True}),
    "scale by the total rank": ("molora", {**TOP_1, "scale_by": "total"}),
    "scale by a root": ("molora", {**TOP_1, "use_rslora": True}),
    "a balancing bias": ("molora", {**TOP_1, "balance_bias_rate": 1e-3}),
    "one router for siblings": ("molora", {**TOP_1, "router_sharing": "input"}),
    "one router for all": ("molora", {**TOP_1, "router_sharing": "model"}),
    "one weight for all": ("molora", {**TOP_1, "router_sharing": "weights"}),
    "experts by depth": ("mola", {"top_k": 1, "num_experts": [4, 5], "renormalize": False}),
    "behind the output": ("molora", {**TOP_1, "adapter_position": "after"}),
    "whole blocks": ("mixlora", {**TOP_1}),
    "beside whole blocks": ("perft", {**TOP_1}),
    "adaptive threshold": ("adamole", {"num_experts": 5, "max_threshold": 0.9}),
    "a table of tasks": ("moelora", {**TOP_1, "router": "table", "router_dim": None}),
    "sparsemixer": ("pmoe", {"num_experts": 6}),
}
"""Preset and overrides under which three tokens leave an expert of some module without any."""


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("case", UNUSED)
def test_without_experts_that_no_token_selects_everything_is_as_before(case, tmp_path):
    preset, overrides = UNUSED[case]
    model, ids = build(preset, **overrides), few_tokens()
    adapter = saved(model, tmp_path / "adapter")
    slim = prune_experts(adapter, expert_usage(model, [batch_of(model, ids)]))
    assert slim.exact
    assert sum(len(change.removed) for change in slim.modules.values()) > 0
    assert slim.adapter.parameters() < adapter.parameters()
    routers = [name for name in adapter.tensors if "molora_router" in name]
    assert all(torch.equal(slim.adapter.tensors[name], adapter.tensors[name]) for name in routers)
    new = reloaded(slim.adapter, preset, tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, ids), logits_of(model, ids), **CLOSE)
    fine = prune_experts(saved(model.double(), tmp_path / "fine"), expert_usage(model, [batch_of(model, ids)]))
    exact = reloaded(fine.adapter, preset, tmp_path / "exact")
    torch.testing.assert_close(logits_of(exact, ids), logits_of(model, ids), **EXACT)


@pytest.mark.parametrize("shared", [0, 2])
def test_experts_are_pruned_by_the_share_of_tokens_and_every_module_keeps_one(shared, tmp_path):
    model = build("molora", **TOP_1, shared_experts=shared)
    adapter, usage = saved(model, tmp_path / "adapter"), expert_usage(model, [batch_of(model, tokens())])
    slim = prune_experts(adapter, usage, below=0.2)
    for module, change in slim.modules.items():
        share = usage[module].selected / 18
        assert change.removed == [index for index in range(5) if share[index] < 0.2]
        assert change.mass_removed == pytest.approx(float(usage[module].mass(5)[change.removed].sum()))
    most = prune_experts(adapter, usage, below=0.999)
    assert not slim.exact
    kept = {module: set(range(5)) - set(change.removed) for module, change in most.modules.items()}
    assert all(one == {int(usage[module].selected[:5].argmax())} for module, one in kept.items())
    reloaded(most.adapter, "molora", tmp_path / "most")


def test_where_all_are_always_selected_the_weight_decides(tmp_path):
    model = build("loramoe", num_experts=4)
    for layer in layers_of(model).values():
        layer.molora_router["default"].weight.data[2] *= 0
        layer.molora_router["default"].weight.data[2] -= 3 * layer.molora_router["default"].weight.data[0]
    usage = expert_usage(model, [batch_of(model, tokens())])
    slim = prune_experts(saved(model, tmp_path / "adapter"), usage, below=0.15)
    for module, change in slim.modules.items():
        assert change.removed == [index for index in range(4) if usage[module].mass(4)[index] < 0.15]
    assert any(change.removed for change in slim.modules.values())


def test_imported_experts_are_pruned_where_they_are_not_used(folders, tmp_path):
    model, ids = compose(tiny_llama(), folders, top_k=1, renormalize=False).eval(), few_tokens(2)
    adapter = saved(model, tmp_path / "adapter")
    slim = prune_experts(adapter, expert_usage(model, [batch_of(model, ids)]))
    assert any(change.removed for change in slim.modules.values())
    new = reloaded(slim.adapter, "arrow", tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, ids), logits_of(model, ids), **CLOSE)
    ranks = prune_ranks(adapter, expert_usage(model, [batch_of(model, tokens())]), keep_energy=0.7)
    assert ranks.adapter.parameters() < adapter.parameters()
    assert logits_of(reloaded(ranks.adapter, "arrow", tmp_path / "ranks"), ids).isfinite().all()


@pytest.mark.parametrize("case", ["linear", "frozen experts", "one router for siblings", "whole blocks"])
def test_a_pruned_adapter_goes_on_training_and_is_saved_again(case, tmp_path):
    preset, overrides = UNUSED[case]
    model = build(preset, **overrides)
    adapter = saved(model, tmp_path / "adapter")
    slim = prune_experts(adapter, expert_usage(model, [batch_of(model, few_tokens())])).adapter
    new = reloaded(slim, preset, tmp_path / "slim", is_trainable=True).train()
    before = {name: p.detach().clone() for name, p in new.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(new.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        loss = new(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    moved = [name for name, p in new.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert any("molora_A" in name for name in moved)
    assert any("molora_router" in name for name in moved)
    new.eval()
    again = reloaded(saved(new, tmp_path / "trained"), preset, tmp_path / "again")
    torch.testing.assert_close(logits_of(again, tokens()), logits_of(new, tokens()), rtol=0, atol=0)


def test_a_pruned_constant_mixture_still_merges(tmp_path):
    model = build("static", num_experts=3, r=2, gate="relu", router_init="ones")
    for layer in layers_of(model).values():
        layer.molora_router["default"].weight.data.copy_(torch.tensor([0.7, -0.5, 0.4]))
    adapter = saved(model, tmp_path / "adapter")
    slim = prune_experts(adapter, expert_usage(model, [batch_of(model, tokens())]))
    assert all(change.removed == [1] for change in slim.modules.values())
    merged = reloaded(slim.adapter, "static", tmp_path / "slim").merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=tokens()).logits, logits_of(model, tokens()), **CLOSE)
