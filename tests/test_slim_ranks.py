"""Fewer ranks: the best expert of a rank, and the ranks that add least."""

from __future__ import annotations

import pytest
import torch
from methods import layers_of, tokens
from slimming import CLOSE, batch_of, build, logits_of, reloaded, saved

from molora.slim import expert_usage, prune_ranks, rerank
from molora.slim.experts import experts_of


def low_rank(model, rank):
    """Give every expert a product of a lower rank than its factors have."""
    for layer in layers_of(model).values():
        down, up = layer.molora_A["default"].weight.data, layer.molora_B["default"].weight.data
        start = 0
        for own in layer.molora_plan["default"].ranks:
            mix = torch.randn(own, rank, dtype=down.dtype) @ torch.randn(rank, own, dtype=down.dtype)
            down[start : start + own] = mix @ down[start : start + own] / own
            start += own
        assert up.abs().sum() > 0


RANKED = {
    "equal": ("molora", {"r": 4}),
    "unequal": ("molora", {"r": [4, 2, 3, 5], "num_experts": 4}),
    "by a root": ("molora", {"r": 4, "use_rslora": True}),
    "by depth": ("mola", {"r": 4}),
    "whole blocks": ("mixlora", {"r": 4}),
    "alone": ("lora", {"r": 4}),
}


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("case", RANKED)
def test_at_their_true_rank_experts_do_what_they_did(case, whitened, tmp_path):
    preset, overrides = RANKED[case]
    model = build(preset, **overrides)
    low_rank(model.double(), 2)
    adapter = saved(model, tmp_path / "adapter")
    usage = expert_usage(model, [batch_of(model, tokens())], moments=True) if whitened else None
    slim = rerank(adapter, 2, usage)
    assert all(max(slim.adapter.plan(module).ranks) == 2 for module in slim.adapter.modules)
    assert slim.adapter.parameters() < adapter.parameters()
    new = reloaded(slim.adapter, preset, tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), rtol=1e-7, atol=1e-8)


def test_a_lower_rank_is_the_best_there_is(tmp_path):
    model = build("molora", r=4)
    adapter = saved(model, tmp_path / "adapter")
    old, new = experts_of(adapter), experts_of(rerank(adapter, 2).adapter)
    layers, inputs = layers_of(model), {}
    hooks = [layer.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for layer in layers.values()]
    usage = expert_usage(model, [batch_of(model, tokens())], moments=True)
    for hook in hooks:
        hook.remove()
    read = {layer.module_key: inputs[layer].flatten(0, 1).double() for layer in layers.values()}
    seen = experts_of(rerank(adapter, 2, usage).adapter)
    for module, own in old.items():
        moment = read[module].T @ read[module] / 18

        def error(difference, moment=moment):
            return (difference @ moment * difference).sum()

        for index, expert in enumerate(own):
            delta, lower, white = (
                one.scale * one.up.double() @ one.down.double()
                for one in (expert, new[module][index], seen[module][index])
            )
            best = torch.linalg.svdvals(delta)[2:].square().sum()
            torch.testing.assert_close((lower - delta).square().sum(), best, rtol=1e-4, atol=1e-9)
            assert error(white - delta) < error(lower - delta)
            # No matrix of this rank is nearer: the outputs themselves, cut to it, are as far away.
            outputs = torch.linalg.svdvals(delta @ read[module].T / 18**0.5)[2:].square().sum()
            torch.testing.assert_close(error(white - delta), outputs, rtol=1e-3, atol=1e-9)


def test_ranks_are_pruned_by_what_they_add(tmp_path):
    model = build("molora", r=3)
    for layer in layers_of(model).values():
        layer.molora_B["default"].weight.data[:, 4] = 0
    adapter, usage = saved(model, tmp_path / "adapter"), expert_usage(model, [batch_of(model, tokens())])
    nothing = prune_ranks(adapter, usage, keep_energy=1.0)
    assert all(change.removed == [4] for change in nothing.modules.values())
    new = reloaded(nothing.adapter, "molora", tmp_path / "nothing")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), **CLOSE)
    some = prune_ranks(adapter, usage, keep_energy=0.8)
    for module, change in some.modules.items():
        ups = torch.cat([expert.up for expert in experts_of(adapter)[module]], dim=1).double()
        energy = usage[module].energy / 18 * ups.square().sum(dim=0)
        left = [rank for rank in range(len(energy)) if rank not in change.removed]
        assert energy[left].sum() >= 0.8 * energy.sum() > energy[left].sum() - energy[left].min()
    assert logits_of(reloaded(some.adapter, "molora", tmp_path / "some"), tokens()).isfinite().all()


def test_experts_that_share_a_lose_the_same_rows(tmp_path):
    model = build("hydralora", r=4)
    for layer in layers_of(model).values():
        for expert in range(layer.molora_plan["default"].num_experts):
            layer.molora_B["default"].weight.data[:, 4 * expert + 2] = 0
    adapter, usage = saved(model, tmp_path / "adapter"), expert_usage(model, [batch_of(model, tokens())])
    slim = prune_ranks(adapter, usage, keep_energy=1.0)
    assert all(change.removed == [2] for change in slim.modules.values())
    assert slim.adapter.config.r == 3
    new = reloaded(slim.adapter, "hydralora", tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), **CLOSE)
