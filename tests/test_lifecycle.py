"""Mixtures grow and shrink between trainings: what was learned stays, what is frozen stays frozen, the rest trains."""

from __future__ import annotations

import copy
import pickle
import warnings

import methods
import pytest
import torch
from loras import MIXED, save_lora
from methods import build, config_of, inputs_of, layers_of, tokens
from peft import PeftModel, get_peft_model

from molora import ConfigError, MoLoraConfig, MoloraError
from molora.compose import compose

PLAIN_INIT = {"router_init": "kaiming_uniform"}
INDEPENDENT = {
    "sigmoid, dense": ("molora", {"gate": "sigmoid"}),
    "relu, dense": ("molora", {"gate": "relu"}),
    "identity, dense": ("molora", {"gate": "identity"}),
    "sigmoid, threshold": ("molora", {"gate": "sigmoid", "selection": "threshold", "threshold": 0.5}),
    "minus a threshold": (
        "molora",
        {"gate": "sigmoid", "selection": "threshold", "threshold": 0.4, "weights": "probability_minus_threshold"},
    ),
    "shared A": ("hydralora", {"gate": "sigmoid"}),
    "unequal ranks": ("molora", {"gate": "sigmoid", "r": [2, 1, 3, 2]}),
    "shared experts": ("molora", {"gate": "sigmoid", "shared_experts": 1}),
    "a list of experts": ("molora", {"gate": "sigmoid", "num_experts": [2, 3]}),
    "activation and bias": ("molora", {"gate": "sigmoid", "expert_activation": "gelu", "expert_bias": True}),
    "activation norm": ("molora", {"gate": "sigmoid", "router": "activation_norm", **PLAIN_INIT}),
    "own activation": ("molora", {"gate": "sigmoid", "router": "activation", "r": 1, **PLAIN_INIT}),
    "task": ("moelora", {"gate": "sigmoid", "scale_by": "expert"}),
    "constant": ("static", {"gate": "identity"}),
    "one router for all": ("molora", {"gate": "sigmoid", "router_sharing": "model"}),
    "one weight for all": ("molora", {"gate": "sigmoid", "router_sharing": "weights"}),
    "dropout": ("molora", {"gate": "sigmoid", "lora_dropout": 0.5}),
}
"""Preset and overrides under which each expert's weight depends on its own logit only."""

COMPETING = {
    "softmax": ("molora", {}),
    "renormalised": ("molora", {"gate": "sigmoid", "renormalize": True}),
    "softmax of the selected": ("molora", {"gate": "sigmoid", "weights": "selected_softmax"}),
    "scale by the total rank": ("molora", {"gate": "sigmoid", "scale_by": "total"}),
    "what is left of one": (
        "molora",
        {
            "gate": "sigmoid",
            "shared_experts": 1,
            "shared_weight": "remainder",
            "selection": "threshold",
            "threshold": 0.1,
        },
    ),
    "normalised logits": ("molora", {"gate": "sigmoid", "logit_norm": 1.0}),
    "threshold of 1/E": ("molora", {"gate": "sigmoid", "selection": "threshold", "weights": "probability"}),
    "unit activation": ("molora", {"gate": "sigmoid", "router": "unit_activation", "r": 1, **PLAIN_INIT}),
    "inside the block": ("mixlora", {"gate": "sigmoid", "selection": "dense", "renormalize": False}),
    "factors": ("polytropon", {"renormalize": False}),
}

GROWN = {
    **{name: {} for name in ("adamole", "mole", "adamoe", "pmoe", "smora", "molora", "hmoe", "arrow", "self-moe")},
    **{name: {} for name in ("polytropon", "becotta", "smear", "x-lora", "aoe", "phatgoose", "glider", "mixlora")},
    **{name: {} for name in ("sira", "hydralora", "mocle", "mola", "polytropon-mhr", "selma", "mor1e", "perft")},
}
"""Presets in which banning an expert leaves exactly what it is without that expert."""
CANNOT_FREEZE = {"hydralora", "mocle", "mola", "polytropon-mhr"}


def logits_of(model, **given):
    with torch.no_grad():
        return model(input_ids=tokens(), **{**inputs_of(model), **given}).logits


def grow(model, n=1, **options):
    """Add experts, whether or not that changes outputs."""
    config = model.peft_config["default"]
    if isinstance(config.r, list):
        options.setdefault("r", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_experts(n, **options)


def scores_for(model, old_inputs):
    """What routing was given before, with a column for each expert that came later."""
    if "expert_scores" not in old_inputs:
        return old_inputs
    scores, new = old_inputs["expert_scores"], inputs_of(model)["expert_scores"]
    return {**old_inputs, "expert_scores": torch.cat([scores, new[:, scores.shape[1] :]], dim=1)}


def train(model, steps=3, lr=0.05):
    """AdamW over all parameters, those included that should not move."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens(), labels=tokens(), **inputs_of(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def snapshot(model, *parts):
    return {n: p.detach().clone() for n, p in model.named_parameters() if any(part in n for part in parts)}


def reloads_bit_for_bit(model, preset, folder):
    expected = logits_of(model)
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(methods.base_model(preset), folder).eval()
    assert torch.equal(logits_of(loaded), expected)
    again = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
    assert torch.equal(logits_of(again), expected)
    return loaded


@pytest.mark.parametrize("case", INDEPENDENT)
def test_where_experts_do_not_compete_new_ones_change_nothing(case):
    preset, overrides = INDEPENDENT[case]
    model = build(preset, **overrides).double()
    expected = logits_of(model)
    freeze = case not in ("shared A", "shared experts", "a list of experts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.add_experts(2, freeze_existing=freeze, r=3 if "unequal" in case else None)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-10, atol=1e-12)
    before = max(layer.molora_plan["default"].num_experts for layer in layers_of(build(preset, **overrides)).values())
    assert max(layer.molora_plan["default"].num_experts for layer in layers_of(model).values()) == before + 2


@pytest.mark.filterwarnings("ignore:.*is above 1/num_experts")
@pytest.mark.parametrize("case", COMPETING)
def test_where_they_compete_it_is_said(case):
    preset, overrides = COMPETING[case]
    model = build(preset, **overrides)
    with pytest.warns(UserWarning, match="outputs change before any training"):
        model.base_model.add_experts(1, freeze_existing=False)


@pytest.mark.parametrize("preset", GROWN)
def test_with_the_new_experts_banned_everything_is_as_before(preset, tmp_path):
    model = build(preset).double()
    given, expected = inputs_of(model), logits_of(model)
    grow(model, 1, freeze_existing=preset not in CANNOT_FREEZE)
    plans = [layer.molora_plan["default"] for layer in layers_of(model).values()]
    experts = {plan.num_experts for plan in plans if plan.router != "none"}
    if len(experts) == 1:
        mask = torch.arange(experts.pop()) < plans[-1].num_experts - 1
        got = logits_of(model, **scores_for(model, given), expert_mask=mask)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    reloads_bit_for_bit(model.float(), preset, tmp_path)


@pytest.mark.parametrize("preset", [name for name in GROWN if name != "mola"])
def test_dropping_experts_equals_banning_them(preset, tmp_path):
    model = build(preset).double()
    mask = torch.arange(model.peft_config["default"].num_experts) != 1
    given = inputs_of(model)
    expected = logits_of(model, **given, expert_mask=mask)
    model.base_model.drop_experts([1])
    if "expert_scores" in given:
        given["expert_scores"] = given["expert_scores"][:, mask]
    torch.testing.assert_close(logits_of(model, **given), expected, rtol=1e-9, atol=1e-11)
    reloads_bit_for_bit(model.float(), preset, tmp_path)


@pytest.mark.parametrize("preset", ["pmoe", "mole", "mixlora", "polytropon", "adamoe", "hmoe", "molora", "mora-cl"])
def test_frozen_experts_stay_as_they_are_whatever_is_done(preset, tmp_path):
    model = build(preset)
    grow(model, 2)
    frozen = snapshot(model, "molora_frozen")
    assert frozen

    def check(model):
        for name, parameter in model.named_parameters():
            if "molora_" in name:
                assert parameter.requires_grad == ("molora_frozen" not in name), name

    check(model)
    model.set_adapter("default")
    check(model)
    with model.disable_adapter():
        assert not any(p.requires_grad for name, p in model.named_parameters() if "molora_" in name)
    model.base_model.enable_adapter_layers()
    check(model)
    model.train()
    check(model)
    trained = snapshot(model, "molora_B")
    losses = train(model)
    assert losses[-1] < losses[0]
    now = snapshot(model, "molora_frozen", "molora_B")
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert any(not torch.equal(now[name], value) for name, value in trained.items())
    reloads_bit_for_bit(model, preset, tmp_path)
    check(PeftModel.from_pretrained(methods.base_model(preset), tmp_path, is_trainable=True))


@pytest.mark.parametrize("preset", ["pmoe", "mora-cl", "molora"])
def test_an_adapter_grows_with_every_task(preset, tmp_path):
    model = build(preset)
    first = model.peft_config["default"].num_experts
    for task in (1, 2):
        train(model, steps=2)
        old = {name: [m.clone() for m in layer.matrices("default")] for name, layer in layers_of(model).items()}
        grow(model, 2, freeze_existing=True)
        config = model.peft_config["default"]
        assert (config.num_experts, config.frozen_experts) == (first + 2 * task, first + 2 * task - 2)
        train(model, steps=2)
        for name, layer in layers_of(model).items():
            for dim, before, now in zip((0, 1), old[name], layer.matrices("default"), strict=True):
                assert torch.equal(now.narrow(dim, 0, before.shape[dim]), before)
        model = reloads_bit_for_bit(model, preset, tmp_path / str(task))
        model = PeftModel.from_pretrained(methods.base_model(preset), tmp_path / str(task), is_trainable=True)


def test_new_experts_start_with_nothing_to_add_whatever_the_first_ones_did():
    model = build("molora")
    grow(model, 2)
    for layer in layers_of(model).values():
        assert not layer.molora_B["default"].weight.any()
        assert layer.molora_A["default"].weight.any()


def test_mixlora_grows_its_blocks_and_leaves_the_loras_of_attention_alone():
    model = build("mixlora")
    before = snapshot(model, "self_attn")
    grow(model, 1)
    after = snapshot(model, "self_attn")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.requires_grad for n, p in model.named_parameters() if "self_attn" in n and "molora_" in n)
    with pytest.raises(ConfigError, match="also the rank of plain LoRAs outside the block"):
        model.base_model.add_experts(1, r=5)


def test_new_experts_may_have_a_rank_of_their_own(tmp_path):
    model = build("mole")
    expected = logits_of(model)
    grow(model, 2, r=7)
    layer = next(iter(layers_of(model).values()))
    assert layer.molora_plan["default"].ranks == (4, 4, 4, 4, 7, 7)
    torch.testing.assert_close(logits_of(model, expert_mask=torch.arange(6) < 4), expected)
    reloads_bit_for_bit(model, "mole", tmp_path)
    with pytest.raises(MoloraError, match="unequal ranks; pass `r`"):
        model.base_model.add_experts(1)


def test_parameters_keep_the_precision_they_were_trained_in():
    base = methods.base_model("molora").to(torch.bfloat16)
    model = get_peft_model(base, config_of("molora", gate="sigmoid")).eval()
    expected = logits_of(model)
    grow(model, 1)
    assert {p.dtype for name, p in model.named_parameters() if "molora_" in name} == {torch.float32}
    assert torch.equal(logits_of(model), expected)


def test_a_second_adapter_does_not_notice():
    model = build("mole")
    model.add_adapter("other", config_of("pmoe"))
    model.eval()
    model.set_adapter("other")
    expected, before = logits_of(model), snapshot(model, ".other.")
    grow(model, 1)
    model.base_model.drop_experts([0])
    model.base_model.freeze_router()
    assert torch.equal(logits_of(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model, ".other.").items())
    assert all(p.requires_grad == (".other." in n) for n, p in model.named_parameters() if "molora_" in n)
    model.base_model.add_experts(1, "other", freeze_existing=False)
    model.set_adapter("default")
    logits_of(model)


def test_an_adapter_loaded_for_inference_stays_so(tmp_path):
    build("mole").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(methods.base_model("mole"), tmp_path)
    grow(model, 1)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("preset", ["mole", "adamole", "pmoe", "mixlora", "polytropon", "x-lora", "self-moe"])
def test_frozen_routers_stay_as_they_are_until_they_are_freed(preset, tmp_path):
    model = build(preset)
    model.base_model.freeze_router()
    before = snapshot(model, "molora_router")
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model, "molora_router").items())
    reloads_bit_for_bit(model, preset, tmp_path)
    loaded = PeftModel.from_pretrained(methods.base_model(preset), tmp_path, is_trainable=True)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "molora_router" in name)
    loaded.base_model.freeze_router(frozen=False)
    assert all(p.requires_grad for name, p in loaded.named_parameters() if "molora_router" in name)
    train(loaded)
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(loaded, "molora_router").items())


def test_imported_experts_can_be_joined_and_dropped(tmp_path):
    folders = [save_lora(tmp_path / f"lora{seed}", seed, **fields) for seed, fields in enumerate(MIXED)]
    model = compose(methods.base_model("arrow"), [str(folder) for folder in folders], "arrow").eval()
    expected = logits_of(model)
    grow(model, 1)
    assert model.peft_config["default"].num_experts == len(MIXED) + 1
    torch.testing.assert_close(logits_of(model, expert_mask=torch.arange(5) < 4), expected)
    reloads_bit_for_bit(model, "arrow", tmp_path / "grown")
    banned = logits_of(model, expert_mask=torch.tensor([True, False, True, True, True]))
    model.base_model.drop_experts([1])
    names = [expert["name"] for expert in model.peft_config["default"].imported_experts]
    assert names == ["lora0", "lora2", "lora3"]
    torch.testing.assert_close(logits_of(model), banned)
    reloads_bit_for_bit(model, "arrow", tmp_path / "shrunk")


def test_new_experts_do_not_take_the_place_of_shared_ones_that_were_imported(tmp_path):
    folders = [str(save_lora(tmp_path / f"lora{r}", r, r=r, target_modules=["q_proj"])) for r in (2, 3, 8)]
    own_router = {"router": "linear", "selection": "dense", "top_k": None, "frozen_experts": 0}
    config = MoLoraConfig.from_adapters(folders, num_experts=2, shared_experts=1, **own_router)
    model = get_peft_model(methods.base_model("molora"), config).eval()
    expected = logits_of(model)
    with pytest.raises(MoloraError, match="3 experts are imported and 2 of them are routed"):
        model.base_model.add_experts(1, freeze_existing=False)
    assert torch.equal(logits_of(model), expected)


def test_a_rank_of_their_own_holds_where_a_pattern_has_one_number(tmp_path):
    model = build("molora", num_experts=2, r=2, rank_pattern={"q_proj": 3}, gate="sigmoid")
    expected = logits_of(model)
    model.base_model.add_experts(1, r=5)
    ranks = {name: layer.molora_plan["default"].ranks for name, layer in layers_of(model).items()}
    assert {own for name, own in ranks.items() if name.endswith("q_proj")} == {(3, 3, 5)}
    assert {own for name, own in ranks.items() if not name.endswith("q_proj")} == {(2, 2, 5)}
    torch.testing.assert_close(logits_of(model), expected)
    reloads_bit_for_bit(model, "molora", tmp_path)
    model = build("mola", r=2, rank_pattern={"q_proj": 3})
    with pytest.raises(MoloraError, match=r"rank_pattern.*'q_proj'.* is 3; leave `r` out"):
        model.base_model.add_experts(1, r=2, freeze_existing=False)


MISTAKES = {
    "unknown adapter": ("mole", lambda tuner: tuner.add_experts(1, "x"), "no molora adapter 'x'; it has default"),
    "frozen shared ones": (
        "frozen shared",
        lambda tuner: tuner.add_experts(1, freeze_existing=False),
        "frozen_experts=5 reaches beyond the 4 routed experts",
    ),
    "none to add": ("mole", lambda tuner: tuner.add_experts(0), "n=0; must be an integer of at least 1"),
    "shards": ("mos", lambda tuner: tuner.add_experts(1), "cannot grow"),
    "pairs": ("mor1e-pairs", lambda tuner: tuner.add_experts(1), "cannot grow"),
    "one LoRA": ("lora", lambda tuner: tuner.add_experts(1), "cannot grow"),
    "shared and frozen": ("mocle", lambda tuner: tuner.add_experts(1), "pass freeze_existing=False"),
    "a list and frozen": ("mola", lambda tuner: tuner.add_experts(1), "pass freeze_existing=False"),
    "shared A and frozen": ("hydralora", lambda tuner: tuner.add_experts(1), "no experts of their own to freeze"),
    "another rank of one A": (
        "hydralora",
        lambda tuner: tuner.add_experts(1, freeze_existing=False, r=9),
        "needs the same rank",
    ),
    "not there": ("mole", lambda tuner: tuner.drop_experts([1, 4]), r"got experts \[4\]; must be indices from 0 to 3"),
    "nothing to drop": ("mole", lambda tuner: tuner.drop_experts([]), "must be indices"),
    "too few left": ("mole", lambda tuner: tuner.drop_experts([0, 1, 2]), "cannot select 2 of 1"),
    "a list drops": ("mola", lambda tuner: tuner.drop_experts([0]), "same number of experts everywhere"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_done_is_refused_and_leaves_the_model_alone(case):
    preset, act, message = MISTAKES[case]
    fields = {"num_experts": 4, "shared_experts": 1, "frozen_experts": 5} if preset == "frozen shared" else {}
    model = build("molora" if fields else preset, **fields)
    expected = logits_of(model)
    with pytest.raises((MoloraError, ConfigError), match=message):
        act(model.base_model)
    assert torch.equal(logits_of(model), expected)


def test_a_merged_adapter_is_unmerged_first():
    model = build("static")
    model.merge_adapter()
    with pytest.raises(MoloraError, match="is merged; unmerge it first"):
        model.base_model.add_experts(1)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="outputs change"):
        model.base_model.add_experts(1)
    logits_of(model)


@pytest.mark.parametrize("scale_by", ["expert", "total"])
@torch.no_grad()
def test_experts_that_stay_do_what_they_did_whatever_scales_follow(scale_by):
    """Also where `rank_pattern` names the rank of each expert, some of them 0."""
    pattern = {"layers.0.self_attn.q_proj": [2, 0, 3, 1]}
    model = methods.build("molora", num_experts=4, r=2, rank_pattern=pattern, scale_by=scale_by)
    alone = torch.tensor([0.0, 0.0, 1.0, 0.0])
    expected = model(input_ids=methods.tokens(), expert_weights=alone).logits
    model.drop_experts([0, 1])
    assert model.peft_config["default"].rank_pattern == {"layers.0.self_attn.q_proj": [3, 1]}
    kept = model(input_ids=methods.tokens(), expert_weights=torch.tensor([1.0, 0.0])).logits
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="share a softmax gate"):
        model.add_experts(1, freeze_existing=False)
    assert model.peft_config["default"].rank_pattern == {"layers.0.self_attn.q_proj": [3, 1, 2]}
    grown = model(input_ids=methods.tokens(), expert_weights=torch.tensor([1.0, 0.0, 1.0])).logits
    torch.testing.assert_close(grown, expected, rtol=1e-4, atol=1e-5)
