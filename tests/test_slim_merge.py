"""Experts that do alike become one: exactly where they are twins, and otherwise by what each adds and how much."""

from __future__ import annotations

import pytest
import torch
from loras import IDS
from methods import layers_of, tokens
from slimming import CLOSE, EXACT, batch_of, build, logits_of, reloaded, saved
from tiny import tiny_llama

from molora.compose import compose
from molora.slim import expert_usage, merge_experts
from molora.slim.experts import Expert, experts_of
from molora.slim.merge import merged_expert
from molora.slim.similarity import cosine_of_deltas, groups_of

DENSE = {"selection": "dense", "weights": "probability"}
TWINS = {
    "softmax": ("molora", {**DENSE}),
    "softmax with a bias": ("molora", {**DENSE, "router_bias": True}),
    "softmax at a temperature": ("molora", {**DENSE, "temperature": 0.5}),
    "sigmoid": ("molora", {**DENSE, "gate": "sigmoid"}),
    "no gate": ("molora", {**DENSE, "gate": "identity", "renormalize": False}),
    "shared experts": ("molora", {**DENSE, "shared_experts": 1}),
    "null experts": ("molora", {"selection": "top_p", "top_p": 1.0, "null_experts": 1, "renormalize": False}),
    "shared A": ("hydralora", {"num_experts": 4}),
    "one router for siblings": ("molora", {**DENSE, "router_sharing": "input"}),
    "one weight for all": ("molora", {**DENSE, "router_sharing": "weights"}),
    "mlp": ("molora", {**DENSE, "router": "mlp", "router_dim": 5}),
    "normalised rows": ("molora", {**DENSE, "router": "normalized"}),
    "constant": ("static", {}),
    "task": ("moelora", {"gate": "softmax"}),
    "a table of tasks": ("moelora", {"gate": "softmax", "router": "table", "router_dim": None}),
    "whole blocks": ("mixlora", {**DENSE}),
    "scale by the total rank": ("molora", {**DENSE, "scale_by": "total"}),
    "frozen experts": ("molora", {**DENSE, "frozen_experts": 2}),
    "statistics of data": ("recommended", {**DENSE}),
    "statistics, without a bias": ("molora", {**DENSE, "router_norm": "standardize"}),
    "means of data": ("molora", {**DENSE, "router_norm": "center", "router_bias": True, "temperature": 2.0}),
}
"""Preset and overrides under which twins may become one without a change."""


def make_twins(model, first=1, second=3):
    """Let two experts be the same, router and all."""
    for layer in layers_of(model).values():
        plan = layer.molora_plan["default"]
        if plan.router == "none":
            continue
        down, up = (matrix.clone() for matrix in layer.matrices("default"))
        starts = [sum(plan.ranks[:index]) for index in range(len(plan.ranks))]
        a, b = (slice(starts[index], starts[index] + plan.ranks[index]) for index in (first, second))
        if plan.layout != "shared_A":
            down[b] = down[a]
        up[:, b] = up[:, a]
        at = 0
        for lower, upper, _ in layer.banks("default"):
            size = upper.weight.shape[1]
            lower.weight.data.copy_(down if plan.layout == "shared_A" else down[at : at + size])
            upper.weight.data.copy_(up[:, at : at + size])
            at += size
        if "default" in layer.molora_router:
            for value, dim in layer.molora_router["default"].by_expert().values():
                value.select(dim, second).copy_(value.select(dim, first))


@pytest.mark.parametrize("calibrated", [True, False], ids=["calibrated in fp64", "uncalibrated in fp32"])
@pytest.mark.parametrize("case", TWINS)
def test_twins_become_one_and_nothing_changes(case, calibrated, tmp_path):
    preset, overrides = TWINS[case]
    model = build(preset, **overrides)
    make_twins(model)
    if calibrated:
        model.double()
    adapter = saved(model, tmp_path / "adapter")
    usage = expert_usage(model, [batch_of(model, tokens())]) if calibrated else None
    number = min(adapter.plan(module).num_experts for module in adapter.routing_groups()) - 1
    slim = merge_experts(adapter, number, usage)
    assert all(
        [1, 3] in slim.modules[module].groups for group in adapter.routing_groups().values() for module in group
    )
    new = reloaded(slim.adapter, preset, tmp_path / "slim")
    bounds = EXACT if calibrated else CLOSE
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), **bounds)


NOTED = {
    "normalised logits": ({**DENSE, "logit_norm": 1.0}, "logit_norm looks at all logits"),
    "sigmoid, renormalised": ({**DENSE, "gate": "sigmoid", "renormalize": True}, "counts as one"),
    "a softmax of sigmoid's": ({**DENSE, "gate": "sigmoid", "weights": "selected_softmax"}, "counts as one"),
    "sparsemax": ({**DENSE, "gate": "sparsemax"}, "counts as one"),
    "softmax": ({**DENSE}, None),
    "sigmoid": ({**DENSE, "gate": "sigmoid"}, None),
}
"""Overrides, and what is said where even twins cannot become one without a change."""


@pytest.mark.parametrize("case", NOTED)
def test_it_is_said_where_even_twins_do_not_become_one(case, tmp_path):
    fields, said = NOTED[case]
    model = build("molora", num_experts=4, **fields)
    make_twins(model)
    slim = merge_experts(saved(model, tmp_path / "adapter"), 3)
    new = reloaded(slim.adapter, "molora", tmp_path / "slim")
    error = (logits_of(new, tokens()) - logits_of(model, tokens())).abs().max()
    notes = [note for note in slim.notes if "counts as one" in note or "logit_norm" in note]
    assert [said in note for note in notes] == [True] * (said is not None)
    assert error > 1e-4 if said else error < 1e-4
    assert slim.adapter.config.router_bias == (case == "softmax")
    whole = merge_experts(saved(model, tmp_path / "again"), 4)
    assert not [note for note in whole.notes if note in notes]


def test_merged_experts_go_on_training(tmp_path):
    model = build("molora", num_experts=4)
    slim = merge_experts(saved(model, tmp_path / "adapter"), 3).adapter
    new = reloaded(slim, "molora", tmp_path / "slim", is_trainable=True).train()
    loss = new(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {name: p.grad for name, p in new.named_parameters() if "molora_" in name}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert any("router" in name and name.endswith("bias") for name in grads)


def test_one_expert_adds_what_its_members_add_by_their_use(tmp_path):
    model = build("molora", num_experts=4, r=2)
    adapter, usage = saved(model, tmp_path / "adapter"), expert_usage(model, [batch_of(model, tokens())])
    slim = merge_experts(adapter, 2, usage)
    old, new = experts_of(adapter), experts_of(slim.adapter)
    for module, change in slim.modules.items():
        for group, one in zip(change.groups, new[module], strict=True):
            used = usage[module].mean_weight[group]
            deltas = [old[module][e].scale * old[module][e].up.double() @ old[module][e].down.double() for e in group]
            wanted = sum(share * delta for share, delta in zip(used / used.sum(), deltas, strict=True))
            got = one.scale * one.up.double() @ one.down.double()
            left, values, right = torch.linalg.svd(wanted, full_matrices=False)
            best = left[:, :2] * values[:2] @ right[:2]
            torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)
            row = slim.adapter.tensors[f"base_model.model.{module}.molora_router.weight"][change.groups.index(group)]
            rows = adapter.tensors[f"base_model.model.{module}.molora_router.weight"][group].double()
            torch.testing.assert_close(row.double(), (used / used.sum()) @ rows, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", ["input", "block", "model", "weights"])
def test_modules_that_share_a_router_are_grouped_alike(sharing, tmp_path):
    model = build("molora", num_experts=5, router_sharing=sharing)
    adapter, usage = saved(model, tmp_path / "adapter"), expert_usage(model, [batch_of(model, tokens())])
    slim = merge_experts(adapter, 3, usage)
    groups = adapter.routing_groups()
    assert sum(map(len, groups.values())) == len(adapter.modules) > len(groups)
    for holder, members in groups.items():
        assert all(slim.modules[module].groups == slim.modules[holder].groups for module in members)
    assert logits_of(reloaded(slim.adapter, "molora", tmp_path / "slim"), tokens()).isfinite().all()


def test_imported_experts_become_own_ones(folders, tmp_path):
    model = compose(tiny_llama(), folders, preset="arrow", top_k=2).eval()
    adapter = saved(model, tmp_path / "adapter")
    slim = merge_experts(adapter, 3)
    config = slim.adapter.config
    assert (config.imported_experts, config.num_experts, config.frozen_experts) == (None, 3, 3)
    new = reloaded(slim.adapter, "arrow", tmp_path / "slim")
    with torch.no_grad():
        assert new(IDS).logits.isfinite().all()
    unmerged = {m: one.groups for m, one in slim.modules.items()}
    old, kept = experts_of(adapter), experts_of(slim.adapter)
    for module, groups in unmerged.items():
        for place, group in enumerate(groups):
            if len(group) == 1:
                before, after = old[module][group[0]], kept[module][place]
                torch.testing.assert_close(after.scale * after.up @ after.down, before.scale * before.up @ before.down)


def test_the_prototypes_of_arrow_have_no_sign(tmp_path):
    model = build("arrow", num_experts=4, r=2, top_k=2)
    make_twins(model)
    for layer in layers_of(model).values():
        layer.molora_router["default"].weight.data[3] *= -1
    adapter = saved(model, tmp_path / "adapter")
    slim = merge_experts(adapter, 3)
    for module, change in slim.modules.items():
        assert [1, 3] in change.groups
        name = f"base_model.model.{module}.molora_router.weight"
        row = slim.adapter.tensors[name][change.groups.index([1, 3])]
        torch.testing.assert_close(row, adapter.tensors[name][1])


def test_the_closest_pairs_meet_first():
    similar = torch.tensor([[1, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.8], [0.9, 0.3, 1, 0.0], [0.2, 0.8, 0.0, 1]])
    assert groups_of(similar, 4) == [[0], [1], [2], [3]]
    assert groups_of(similar, 3) == [[0, 2], [1], [3]]
    assert groups_of(similar, 2) == [[0, 2], [1, 3]]
    assert groups_of(similar, 1) == [[0, 1, 2, 3]]


def test_cosines_of_what_experts_add_need_no_product():
    torch.manual_seed(1)
    banks = [[Expert(torch.randn(r, 6), torch.randn(5, r), 0.5 * r) for r in (1, 2, 3)] for _ in range(2)]
    flat = [torch.cat([(b[e].scale * b[e].up @ b[e].down).flatten() for b in banks]) for e in range(3)]
    expected = torch.nn.functional.cosine_similarity(torch.stack(flat)[:, None], torch.stack(flat)[None], dim=-1)
    torch.testing.assert_close(cosine_of_deltas(banks, 3), expected.double(), rtol=1e-5, atol=1e-6)


def test_members_without_rank_add_nothing():
    empty, own = (Expert(torch.randn(r, 6), torch.randn(5, r), 2.0 * bool(r)) for r in (0, 2))
    one = merged_expert([empty, own], [0.25, 0.75], one_a=False, root=None)
    torch.testing.assert_close(one.scale * one.up @ one.down.double(), 1.5 * own.up.double() @ own.down.double())
    assert merged_expert([empty, empty], [0.5, 0.5], one_a=False, root=None).rank == 0
