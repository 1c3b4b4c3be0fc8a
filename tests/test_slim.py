"""What slimming can be done to which adapter; what it does not touch stays as it is."""

from __future__ import annotations

import pytest
import torch
from methods import SETTINGS, tokens
from slimming import batch_of, build, logits_of, reloaded, saved

from molora import ConfigError, MoLoraConfig
from molora.slim import drop_experts, expert_usage, merge_experts, prune_experts, prune_ranks, rerank
from molora.slim.experts import experts_of, rebuilt


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("preset", [name for name in SETTINGS if name not in ("mos", "mor1e-pairs")])
def test_taken_apart_and_put_together_not_a_bit_changes(preset, tmp_path):
    adapter = saved(build(preset), tmp_path / "adapter")
    again = rebuilt(adapter, experts_of(adapter))
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[name], value) for name, value in adapter.tensors.items())
    assert again.config.to_dict() == adapter.config.to_dict()


EVERYTHING = {
    "prune": lambda adapter, usage: prune_experts(adapter, usage),
    "drop": lambda adapter, usage: drop_experts(adapter, [0]),
    "ranks": lambda adapter, usage: prune_ranks(adapter, usage, 0.9),
    "rerank": lambda adapter, usage: rerank(adapter, 1),
    "merge": lambda adapter, usage: merge_experts(adapter, 2),
}
REFUSED = {
    "pairs": ("mor1e-pairs", {}, tuple(EVERYTHING), "'pairs'"),
    "shards": ("mos", {}, tuple(EVERYTHING), "'shards'"),
    "factors": ("smear", {}, ("prune", "ranks", "rerank", "merge"), "'factors'"),
    "shared A": ("hydralora", {}, ("prune", "rerank"), "'shared_A'"),
    "own activation": ("flylora", {}, ("prune", "ranks", "rerank", "merge"), "'activation'"),
    "norm of the activation": ("aoe", {}, ("prune", "ranks", "rerank", "merge"), "'activation_norm'"),
    "scores": ("glider", {}, ("merge",), "expert_scores"),
    "activation": ("molora", {"expert_activation": "gelu"}, ("rerank", "merge"), "expert_activation"),
    "bias": ("molora", {"expert_bias": True}, ("rerank", "merge"), "expert_bias"),
    "alone": ("lora", {}, ("prune", "drop", "merge"), "there is one expert"),
    "by depth": ("mola", {}, ("drop",), "the same number in all layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason_and_the_rest_works(case, tmp_path):
    preset, overrides, refused, reason = REFUSED[case]
    model = build(preset, **overrides)
    adapter = saved(model, tmp_path / "adapter")
    usage = expert_usage(model, [batch_of(model, tokens())]) if preset != "mos" else {}
    for name, operation in EVERYTHING.items():
        if name in refused:
            with pytest.raises(ConfigError, match="of this adapter") as error:
                operation(adapter, usage)
            assert reason in str(error.value)
        else:
            slim = operation(adapter, usage).adapter
            assert logits_of(reloaded(slim, preset, tmp_path / name), tokens()).isfinite().all()


def test_all_reasons_come_at_once(tmp_path):
    adapter = saved(build("molora", expert_activation="gelu", expert_bias=True, score_weight=1.0), tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        merge_experts(adapter, 2)
    assert [problem.field for problem in error.value.problems] == ["router", "expert_activation", "expert_bias"]


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda adapter, usage: drop_experts(adapter, [4]), r"got \[4\]; must be some of the experts 0 to 3"),
        (lambda adapter, usage: drop_experts(adapter, []), "must be some of the experts"),
        (lambda adapter, usage: drop_experts(adapter, range(4)), "not all of them"),
        (lambda adapter, usage: drop_experts(adapter, [0, 1, 2]), "cannot select 2 of 1"),
        (lambda adapter, usage: prune_experts(adapter, usage, 1.5), r"must be a share in \[0, 1\)"),
        (lambda adapter, usage: prune_ranks(adapter, usage, 0.0), r"must be a share in \(0, 1\]"),
        (lambda adapter, usage: rerank(adapter, 0), "must be at least 1"),
        (lambda adapter, usage: merge_experts(adapter, 5), "must be from 1 to 4"),
        (lambda adapter, usage: merge_experts(adapter, 1), "cannot select 2 of 1"),
    ],
)
def test_impossible_numbers_are_refused(operation, message, tmp_path):
    model = build("molora", selection="top_k", top_k=2)
    usage = expert_usage(model, [batch_of(model, tokens())])
    with pytest.raises(ConfigError, match=message):
        operation(saved(model, tmp_path / "adapter"), usage)


def test_other_tensors_and_their_types_stay(tmp_path):
    model = build("molora", modules_to_save=["lm_head"], bias="molora_only").bfloat16()
    adapter = saved(model, tmp_path / "adapter")
    slim = rerank(adapter, 1).adapter
    others = [name for name in adapter.tensors if "molora_A" not in name and "molora_B" not in name]
    assert any("lm_head" in name for name in others)
    assert all(torch.equal(slim.tensors[name], adapter.tensors[name]) for name in others)
    assert {value.dtype for name, value in slim.tensors.items() if "molora_" in name} == {torch.bfloat16}


def test_a_config_may_name_experts_without_rank_in_single_modules_only():
    config = MoLoraConfig(num_experts=3, rank_pattern={"q_proj": [2, 0, 1]})
    assert config.rank_pattern["q_proj"] == [2, 0, 1]
    for fields in ({"r": [2, 0, 1]}, {"rank_pattern": {"q_proj": [1, 0]}}):
        with pytest.raises(ConfigError, match="must be an integer of at least 1"):
            MoLoraConfig(num_experts=3, **fields)
    with pytest.raises(ConfigError, match="same rank for every expert in a module"):
        MoLoraConfig(num_experts=3, expert_layout="shared_A", rank_pattern={"q_proj": [2, 0, 1]})
    MoLoraConfig(num_experts=[2, 3], rank_pattern={"q_proj": [2, 0]})


def test_ranks_of_another_number_of_experts_are_refused_when_they_meet_the_module():
    with pytest.raises(ConfigError, match="has 3 experts, and its ranks are"):
        build("mola", num_experts=[2, 3], rank_pattern={"layers.1.mlp.down_proj": [2, 0]})
