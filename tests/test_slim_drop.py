"""Experts are dropped from a folder as from a model, and it is said what that does to the others."""

from __future__ import annotations

import pytest
import torch
from methods import layers_of, tokens
from peft import get_peft_model
from slimming import CLOSE, batch_of, build, logits_of, reloaded, saved
from tiny import tiny_llama

from molora import MoLoraConfig
from molora.compose import compose
from molora.slim import drop_experts, expert_usage, merge_experts, rerank
from molora.slim.drop import dropping_changes
from molora.slim.experts import experts_of, rebuilt

DROPPED = {
    "linear": ("molora", {}, [1]),
    "two at once": ("molora", {}, [0, 3]),
    "adaptive threshold": ("adamole", {}, [2]),
    "null experts": ("adamoe", {}, [0]),
    "unequal ranks": ("hmoe", {}, [2]),
    "frozen experts": ("molora", {"frozen_experts": 2}, [1]),
    "shared experts": ("molora", {"shared_experts": 1}, [3]),
    "frozen shared experts": ("molora", {"num_experts": 4, "shared_experts": 1, "frozen_experts": 5}, [1]),
    "shared A": ("hydralora", {}, [0]),
    "factors": ("smear", {}, [1]),
    "a table with splits": ("polytropon-mhr", {}, [1]),
    "domains": ("becotta", {}, [0]),
    "mlp and bias": ("x-lora", {}, [1]),
    "own activation": ("flylora", {"scale_by": "expert"}, [4, 5]),
    "whole blocks": ("mixlora", {}, [2]),
    "one weight for all": ("self-moe", {}, [0]),
    "constant": ("psec", {}, [3]),
    "a balancing bias": ("molora", {"balance_bias_rate": 1e-3, "selection": "top_k"}, [1]),
    "cosine": ("molora", {"router": "cosine"}, [1]),
    "statistics of data": ("recommended", {}, [1]),
    "statistics, adaptive threshold": ("adamole", {"router_norm": "standardize"}, [2]),
    "statistics": ("mole", {"router_norm": "center"}, [0]),
}


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("case", DROPPED)
def test_dropping_does_to_a_folder_what_the_model_does_to_itself(case, tmp_path):
    preset, overrides, dropped = DROPPED[case]
    model = build(preset, **overrides)
    adapter = saved(model, tmp_path / "adapter")
    slim = drop_experts(adapter, dropped)
    model.base_model.drop_experts(dropped)
    expected = saved(model, tmp_path / "expected")
    assert slim.adapter.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        torch.testing.assert_close(slim.adapter.tensors[name], value, rtol=0, atol=0)
    assert slim.adapter.config.to_dict() == expected.config.to_dict()
    new = reloaded(slim.adapter, preset, tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), rtol=0, atol=0)


def test_dropping_imported_experts_is_the_same_too(folders, tmp_path):
    model = compose(tiny_llama(), folders, top_k=2).eval()
    slim = drop_experts(saved(model, tmp_path / "adapter"), [1])
    model.base_model.drop_experts([1])
    new = reloaded(slim.adapter, "arrow", tmp_path / "slim")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(model, tokens()), rtol=0, atol=0)


def test_shared_experts_that_were_imported_stay_when_others_go(folders, tmp_path):
    own_router = {"router": "linear", "selection": "dense", "top_k": None}
    config = MoLoraConfig.from_adapters(folders, num_experts=3, shared_experts=1, **own_router)
    model = get_peft_model(tiny_llama(), config).eval()
    banned = logits_of_banned(model, [False, True, True])
    slim = drop_experts(saved(model, tmp_path / "adapter"), [0])
    model.base_model.drop_experts([0])
    assert [one["name"] for one in model.peft_config["default"].imported_experts] == ["lora1", "lora2", "lora3"]
    assert model.peft_config["default"].imported_experts == slim.adapter.config.imported_experts
    torch.testing.assert_close(logits_of(model, tokens()), banned, **CLOSE)
    assert logits_of(reloaded(slim.adapter, "arrow", tmp_path / "slim"), tokens()).isfinite().all()


@torch.no_grad()
def logits_of_banned(model, mask):
    return model(input_ids=tokens(), expert_mask=torch.tensor(mask)).logits


FATE = {
    "top-k, renormalised": ({"selection": "top_k", "top_k": 2, "renormalize": True}, True),
    "top-k of a selected softmax": ({"selection": "top_k", "top_k": 2, "weights": "selected_softmax"}, True),
    "sigmoid, top-k": ({"selection": "top_k", "top_k": 1, "gate": "sigmoid", "renormalize": False}, True),
    "scale by the total rank": ({"selection": "top_k", "top_k": 2, "renormalize": True, "scale_by": "total"}, True),
    "sigmoid, a level": ({"selection": "threshold", "threshold": 0.5, "gate": "sigmoid", "weights": "one"}, True),
    "sparsemax": ({"selection": "dense", "gate": "sparsemax", "renormalize": False}, True),
    "softmax, top-k": ({"selection": "top_k", "top_k": 1, "renormalize": False}, False),
    "softmax, a level": ({"selection": "threshold", "threshold": 0.33, "renormalize": True}, False),
    "nucleus": ({"selection": "top_p", "top_p": 0.65, "renormalize": True}, False),
    "sigmoid, 1/E": ({"selection": "threshold", "gate": "sigmoid", "renormalize": False, "weights": "one"}, False),
    "normalised logits": ({"selection": "top_k", "top_k": 2, "renormalize": True, "logit_norm": 1.0}, False),
    "ranked with a bias": (
        {
            **{"selection": "top_k", "top_k": 1, "renormalize": True},
            **{"balance_bias_rate": 1e-3, "freeze_router": True},
        },
        False,
    ),
    "sigmoid, ranked with a bias": (
        {"selection": "top_k", "top_k": 1, "gate": "sigmoid", "renormalize": False, "balance_bias_rate": 1e-3},
        True,
    ),
    "a place lost by magnitude": (
        {"selection": "top_k_magnitude", "top_k": 2, "gate": "identity", "renormalize": False, "min_logit": 0.0},
        False,
    ),
    "a place lost by a bias": (
        {
            **{"selection": "top_k", "top_k": 2, "gate": "sigmoid", "renormalize": False},
            **{"balance_bias_rate": 1e-3, "min_logit": 0.0},
        },
        False,
    ),
    "a place without a weight": (
        {"selection": "top_k", "top_k": 2, "gate": "relu", "renormalize": False, "balance_bias_rate": 1e-3},
        False,
    ),
    "sparsemax, top-k": ({"selection": "top_k", "top_k": 1, "gate": "sparsemax", "renormalize": False}, False),
}
"""Fields, and whether the others' weights stay when an expert goes that is never selected."""

LOGITS = {"sigmoid, 1/E": (-1.5, -0.9), "ranked with a bias": (0.29, 0.25), "sparsemax, top-k": (0.0, 0.25)}
"""Of the second and the last expert, where they are not -1.5 and 0.25."""

BIASES = {
    "ranked with a bias": [0, -0.5, 0, 0.015],
    "a place lost by a bias": [0, 2, 0, 0],
    "a place without a weight": [0, 2, 0, 0],
}
"""Balancing biases, where they are not zero."""


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("case", FATE)
def test_it_is_said_whether_dropping_an_unused_expert_changes_the_others(case, tmp_path):
    fields, stays = FATE[case]
    losses = {"routing_losses": {"load_balancing": 0.01}} if fields.get("weights") == "one" else {}
    model = build("molora", num_experts=4, router_bias=True, **{**fields, **losses}).double()
    for layer in layers_of(model).values():  # expert 1 is just below being selected
        router = layer.molora_router["default"]
        router.weight.data[1] = router.weight.data.mean(dim=0) * 0
        second, last = LOGITS.get(case, (-1.5, 0.25))
        router.bias.data.copy_(torch.tensor([0.3, second, 0.2, last]))
        router.weight.data *= 0.05
        if case in BIASES:
            layer.molora_bias["default"].weight.data.copy_(torch.tensor(BIASES[case]))
    usage = expert_usage(model, [batch_of(model, tokens())])
    assert all(float(one.weight[1]) == 0 for one in usage.values())
    slim = drop_experts(saved(model, tmp_path / "adapter"), [1], usage)
    assert (not dropping_changes(model.peft_config["default"])) == stays
    assert slim.exact == stays
    new = reloaded(slim.adapter, "molora", tmp_path / "slim")
    error = (logits_of(new, tokens()) - logits_of(model, tokens())).abs().max().item()
    assert error < 1e-12 if stays else error > 1e-4
    assert any("exactly as before" in note for note in slim.notes) == stays


def test_folding_keeps_the_scale_of_all_others_where_it_goes_by_the_total_rank(tmp_path):
    model = build("molora", num_experts=4, scale_by="total", gate="sigmoid", renormalize=False)
    adapter = saved(model, tmp_path / "adapter")
    slim = drop_experts(adapter, [0])
    old, new = experts_of(adapter), experts_of(slim.adapter)
    for module, own in new.items():
        for index, expert in enumerate(own, start=1):
            before = old[module][index]
            torch.testing.assert_close(expert.up * expert.scale, before.up * before.scale)
            assert expert.scale != before.scale


def test_a_module_may_lose_all_it_had(tmp_path):
    model = build("molora", num_experts=4, top_k=1, selection="top_k", renormalize=False)
    adapter = saved(model, tmp_path / "adapter")
    first = adapter.modules[0]
    experts = experts_of(adapter)
    alone = rebuilt(adapter, {**experts, first: [experts[first][0], *(one.only([]) for one in experts[first][1:])]})
    slim = drop_experts(alone, [0]).adapter
    assert slim.plan(first).ranks == (0, 0, 0)
    new = reloaded(slim, "molora", tmp_path / "slim", is_trainable=True)
    zeroed = dict(drop_experts(adapter, [0]).adapter.tensors)
    zeroed[f"base_model.model.{first}.molora_B.weight"] *= 0
    same = reloaded(type(slim)(drop_experts(adapter, [0]).adapter.config, zeroed), "molora", tmp_path / "zeroed")
    torch.testing.assert_close(logits_of(new, tokens()), logits_of(same, tokens()), **CLOSE)
    new.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    again = reloaded(saved(new, tmp_path / "trained"), "molora", tmp_path / "again")
    torch.testing.assert_close(logits_of(again, tokens()), logits_of(new.eval(), tokens()), rtol=0, atol=0)
    for number, operation in enumerate((lambda: merge_experts(slim, 2), lambda: rerank(slim, 1))):
        reloaded(operation().adapter, "molora", tmp_path / str(number))
