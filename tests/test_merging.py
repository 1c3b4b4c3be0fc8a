"""Merging: exact where mixing weights are fixed, by themselves or by what is given; else a refusal, or an
approximation that was asked for."""

import copy

import methods
import pytest
import tiny
import torch
from methods import layers_of, tokens
from peft import get_peft_model

from molora import MergeError, MoloraError
from molora.plain.calibrate import batches_by_part

FIXED = {
    "lora": {},
    "lorahub": {},
    "mos": {},
    "psec": {},
    "selma": {},
    "static": {},
    "moelora": {"task": 1},
    "mocle": {"task": 2},
    "polytropon": {"task": 1},
    "polytropon-mhr": {"task": 2},
    "x-lora": {"prompt": tokens(1)},
}
"""Methods whose weights are fixed, with what fixes them."""


def as_inputs(how):
    return {"task_ids": torch.tensor([how["task"]] * 3)} if "task" in how else {}


def rows_of(how):
    return tokens(1) if "prompt" in how else tokens()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preset", FIXED)
@torch.no_grad()
def test_fixed_mixtures_merge_to_rounding_and_unmerge(preset, dtype):
    how, tolerance = FIXED[preset], {torch.float32: 2e-5, torch.float64: 5e-6}[dtype]
    model = methods.build(preset).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(input_ids=rows_of(how), **as_inputs(how)).logits
    model.merge_adapter(safe_merge=True, **how)
    assert all(layer.merged for layer in layers_of(model).values())
    merged = model(input_ids=rows_of(how)).logits
    assert all(layer.merged for layer in layers_of(model).values())
    torch.testing.assert_close(merged, expected, rtol=tolerance, atol=tolerance)
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model(input_ids=rows_of(how), **as_inputs(how)).logits, expected, rtol=tolerance, atol=tolerance
    )
    unloaded = model.merge_and_unload(**how)
    assert not layers_of(unloaded)
    torch.testing.assert_close(unloaded(input_ids=rows_of(how)).logits, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_a_merge_for_one_task_is_not_one_for_another():
    model = methods.build("polytropon")
    other = model(input_ids=tokens(), task_ids=torch.tensor([1, 1, 1])).logits
    merged = model.merge_and_unload(task=0)
    assert (merged(input_ids=tokens()).logits - other).abs().max() > 1e-3


@torch.no_grad()
def test_a_merge_for_a_prompt_holds_for_what_follows_it():
    model = methods.build("x-lora")
    prompt, whole = tokens(1, 4), tokens(1, 9)
    with_prompt = {"input_ids": whole, "prompt_mask": torch.arange(9).unsqueeze(0) < 4}
    expected = model(**with_prompt).logits
    assert torch.equal(whole[:, :4], prompt) or whole[:, :4].numel()
    merged = copy.deepcopy(model).merge_and_unload(prompt=whole[:, :4])
    torch.testing.assert_close(merged(input_ids=whole).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_fix_a_router_that_reads_nothing_else():
    model = methods.build("lora", num_experts=3, r=2, router="external", gate="softmax", renormalize=False)
    scores = [0.3, -1.0, 2.0]
    expected = model(input_ids=tokens(), expert_scores=torch.tensor([scores])).logits
    merged = model.merge_and_unload(expert_scores=scores)
    torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", [{}, {"selection": "top_k", "top_k": 1}, {"selection": "top_p", "top_p": 0.5}])
@torch.no_grad()
def test_a_softmax_over_a_single_expert_is_no_choice_and_merges(selection):
    fields = {"freeze_router": True, "renormalize": False, "routing_losses": {}, **selection}
    model = methods.build("molora", num_experts=1, **fields)
    expected = model(input_ids=tokens()).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_sigmoid_over_one_expert_is_a_choice():
    with pytest.raises(MergeError, match="routes every token by itself"):
        methods.build("phatgoose-gate").merge_and_unload()


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("adamole", r"routes every token by itself.*--as lora --calibrate.*approximate=True.*--as experts"),
        ("polytropon", "weighs its experts by the task_ids of each row.*pass `task=`"),
        ("x-lora", "decides by the prompt.*pass `prompt=`"),
        ("smear", "has nonlinear experts"),
        ("mixlora", "has nonlinear experts"),
        ("perft", "no single weight reproduces it"),
    ],
)
def test_a_refusal_says_why_and_names_the_ways_out(preset, said):
    model = methods.build(preset)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match=f"(?s){said}"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.molora_stand_in for layer in layers_of(model).values())


def test_a_task_that_is_not_known_is_refused_and_nothing_changes():
    model = methods.build("polytropon")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MoloraError, match="got task 3; adapter 'default' knows 0 to 2"):
        model.merge_adapter(task=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def calibration(model):
    rows = [{"input_ids": tokens(1, 12, seed=row)[0].tolist()} for row in range(40)]

    def collate(part):
        ids = torch.tensor([row["input_ids"] for row in part])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return batches_by_part(rows, collate, 8)


@torch.no_grad()
def test_an_approximate_merge_must_be_asked_for_and_comes_near():
    model = methods.build("phatgoose-gate")
    base = methods.base_model("phatgoose-gate")(input_ids=tokens()).logits
    batches = calibration(model)
    routed = model(input_ids=tokens()).logits
    with pytest.raises(MoloraError, match="pass approximate=True too"):
        model.merge_adapter(calibration=batches)
    with pytest.raises(MoloraError, match="approximate=True needs `calibration=`"):
        model.merge_adapter(approximate=True)
    model.merge_adapter(approximate=True, calibration=batches)
    merged = model(input_ids=tokens()).logits
    assert (merged - routed).norm() < 0.8 * (base - routed).norm()
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=tokens()).logits, routed, rtol=1e-4, atol=1e-5)
    assert not any(layer.molora_stand_in for layer in layers_of(model).values())


def test_what_can_be_merged_exactly_is_not_approximated():
    model = methods.build("static")
    expected = model(input_ids=tokens()).logits
    model.merge_adapter(approximate=True)
    torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_sixteen_bit_weights_are_rounded_once():
    model = methods.build("static").to(torch.bfloat16)
    [layer, *_] = layers_of(model).values()
    weight = layer.get_base_weight().clone()
    lora_a, lora_b = layer.constant_factors("default")
    model.merge_adapter()
    assert torch.equal(layer.get_base_weight(), (weight.float() + lora_b @ lora_a).bfloat16())


@pytest.mark.parametrize("preset", ["polytropon", "polytropon-mhr", "mocle"])
@torch.no_grad()
def test_routers_that_draw_noise_in_training_merge_without_it(preset):
    model = methods.build(preset)
    expected = model(input_ids=tokens(), task_ids=torch.tensor([1, 1, 1])).logits
    merged = model.train().merge_and_unload(task=1).eval()
    torch.testing.assert_close(merged(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_single_expert_merges_where_factors_are_mixed():
    model = methods.build("polytropon", num_experts=1, gate="softmax", freeze_router=True, renormalize=False)
    expected = model(input_ids=tokens(), task_ids=torch.tensor([0, 0, 0])).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def two_adapters(first, second, **fields):
    model = methods.build(first, **fields)
    model.add_adapter("other", methods.config_of(second))
    return model.eval()


@pytest.mark.parametrize(
    ("how", "names", "said"),
    [
        ({"prompt": tokens(1)}, ["default"], "make it the active adapter"),
        ({"prompt": tokens(2)}, ["default"], r"shape \[2, 6\]; give the ids of one"),
        ({}, ["nope"], "there is no adapter 'nope'; there are default, other"),
    ],
)
def test_what_a_merge_cannot_see_is_said(how, names, said):
    model = two_adapters("molora", "static", num_experts=4, router_level="sequence")
    if "make it" in said:
        model.set_adapter("other")
    with pytest.raises(MoloraError, match=said):
        model.merge_adapter(names, **how)
    assert not any(layer.merged for layer in layers_of(model).values())


def test_a_task_is_checked_against_the_adapter_that_is_merged():
    model = two_adapters("polytropon", "static")
    model.set_adapter("other")
    with pytest.raises(MoloraError, match="got task 99; adapter 'default' knows 0 to 2"):
        model.merge_adapter(["default"], task=99)


@pytest.mark.parametrize("how", ["missing", "shape", "nan"])
def test_factors_that_do_not_fit_leave_every_weight_alone(how):
    model = methods.build("adamole")
    factors = {name.removeprefix("base_model.model."): None for name in layers_of(model)}
    for name, layer in zip(factors, layers_of(model).values(), strict=True):
        factors[name] = (torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2))
    last = list(factors)[-1]
    if how == "missing":
        factors = {last: factors[last]}
    elif how == "shape":
        factors[last] = (factors[last][0][:, :-1], factors[last][1])
    else:
        factors[last][0][0, 0] = float("nan")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"factors|NaNs"):
        model.merge_adapter(factors=factors, safe_merge=True)
    assert not any(layer.merged for layer in layers_of(model).values())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-5)


def test_an_output_layer_that_is_the_embedding_too_is_not_merged_into():
    base = tiny.tiny_llama(tie_word_embeddings=True)
    model = get_peft_model(base, methods.config_of("static", target_modules=["lm_head", "q_proj"]))
    with pytest.raises(MergeError, match="is the input embedding too"):
        model.merge_and_unload()
