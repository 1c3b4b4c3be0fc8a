"""What a call may give to routing, on every architecture: bans, weights, prompts, tasks, mixed batches, beams."""

from __future__ import annotations

import copy

import methods
import pytest
import tiny
import torch
from loras import MIXED, save_lora
from methods import SETTINGS, build, config_of, inputs_of, layers_of, tokens
from peft import get_peft_model
from torch import nn

from molora import MoLoraConfig, MoloraError, record_routing, routing_inputs
from molora.compose import compose
from molora.errors import TargetModulesError

ROUTED = [name for name in SETTINGS if name not in ("lora", "mos", "mola", "phatgoose-gate")]


def logits_of(model, ids=None, **given):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **{**inputs_of(model), **given}).logits


def experts_of(model):
    return max(layer.molora_plan["default"].num_experts for layer in layers_of(model).values())


@pytest.mark.parametrize("preset", ROUTED)
def test_banned_experts_are_not_used_by_the_rows_that_ban_them(preset):
    """Changing what a banned expert does changes nothing."""
    model = build(preset)
    count = experts_of(model)
    one = torch.arange(count) != 1
    mask = torch.stack([one, one, torch.ones(count, dtype=torch.bool)])
    expected = logits_of(model, expert_mask=mask)
    torch.testing.assert_close(logits_of(model, expert_mask=one)[:2], expected[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits_of(model)[2:], expected[2:], rtol=1e-4, atol=1e-5)
    for layer in layers_of(model).values():
        plan = layer.molora_plan["default"]
        if plan.router == "none" or plan.layout in ("pairs", "shared_A"):
            continue
        start = sum(plan.ranks[:1])
        for _, ups, _ in layer.banks("default"):
            ups.weight.data[:, start : start + plan.ranks[1]] += 1.0
    torch.testing.assert_close(logits_of(model, expert_mask=mask)[:2], expected[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", [name for name in ROUTED if name not in ("mor1e", "mor1e-pairs")])
def test_weights_that_are_given_replace_the_routing(preset):
    model = build(preset)
    count = experts_of(model)
    weights = torch.rand(3, count)
    one_by_one = [logits_of(model, expert_weights=row)[[i]] for i, row in enumerate(weights)]
    got = logits_of(model, expert_weights=weights)
    torch.testing.assert_close(got, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # nothing else is asked for
        torch.testing.assert_close(model(input_ids=tokens(), expert_weights=weights).logits, got)


WRONG = {
    "a mask of other experts": (
        "mole",
        {"expert_mask": torch.ones(3).bool()},
        "expert_mask has 3 columns .* 4 experts",
    ),
    "a mask of other rows": (
        "mole",
        {"expert_mask": torch.ones(2, 4).bool()},
        "expert_mask has 2 rows and the batch 3",
    ),
    "all banned": ("mole", {"expert_mask": torch.zeros(4).bool()}, "bans every expert of a row"),
    "all banned in a row": (
        "mole",
        {"expert_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()},
        "bans every expert of a row",
    ),
    "weights of other experts": ("mole", {"expert_weights": torch.ones(5)}, "expert_weights has 5 columns"),
    "weights of some shared experts": (
        "mocle",
        {"expert_weights": torch.ones(3), "task_ids": torch.zeros(2, dtype=torch.long)},
        "this adapter 4 experts, 5 with its shared ones; give one each",
    ),
    "weights of other rows": ("mole", {"expert_weights": torch.ones(2, 4)}, "expert_weights has 2 rows"),
    "scores of other experts": ("glider", {"expert_scores": torch.ones(3, 5)}, "expert_scores has 5 columns"),
    "scores of too few tokens": ("glider", {"expert_scores": torch.ones(3, 2, 4)}, "of 2 tokens do not reach the 6"),
    "a prompt of other length": (
        "smear",
        {"prompt_mask": torch.ones(3, 4).bool()},
        "4 columns and the input 6 tokens",
    ),
    "a longer prompt": ("smear", {"prompt_mask": torch.ones(3, 9).bool()}, "9 columns and the input 6 tokens"),
    "no prompt": ("smear", {"prompt_mask": torch.zeros(3, 6).bool()}, "marks no token of a row"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_with_both_sizes(case):
    preset, given, message = WRONG[case]
    model = build(preset)
    with pytest.raises(MoloraError, match=message):
        logits_of(model, **given)
    logits_of(model)  # and the model is as before


@pytest.mark.parametrize("preset", ["smear", "x-lora"])
def test_a_decision_about_a_sequence_reads_the_prompt_alone(preset):
    model = build(preset)
    prompt = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    prompt[1, 0] = preset == "x-lora"  # whose features are those of all tokens before
    other = torch.where(prompt, tokens(), tokens(seed=9))
    decisions = []
    for ids in (tokens(), other):
        with record_routing(model) as records:
            logits_of(model, ids, prompt_mask=prompt)
        decisions.append(records[0].routing.weights)
    torch.testing.assert_close(decisions[0], decisions[1], rtol=1e-4, atol=1e-6)
    labels = torch.where(prompt, -100, tokens())
    with record_routing(model) as records:
        logits_of(model, labels=labels)
    torch.testing.assert_close(records[0].routing.weights[:1], decisions[0][:1])


def test_scores_by_token_cannot_be_given_for_text_yet_to_be_written():
    model = build("glider")
    scores = torch.randn(3, 6, 4)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with pytest.raises(MoloraError, match=r"one vector per row, \[B, E\]"):
        model.generate(input_ids=tokens(), expert_scores=scores, **options)
    model.generate(input_ids=tokens(), expert_scores=scores[:, 0], **options)


def test_a_routing_inputs_block_equals_the_keywords_and_the_inner_one_wins():
    model = build("moelora")
    ids = torch.tensor([2, 0, 1])
    expected = logits_of(model, task_ids=ids)
    with torch.no_grad(), routing_inputs(model, task_ids=ids.flip(0)), routing_inputs(model, task_ids=ids):
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    assert torch.equal(logits_of(model, task_ids=ids, expert_scores=None, expert_mask=None), expected)
    with pytest.raises(MoloraError, match="reads task_ids"), torch.no_grad():
        model(input_ids=tokens())


@pytest.mark.parametrize(
    ("preset", "fields"),
    [("mixlora", {}), ("molora", {"router_sharing": "block"}), ("molora", {"router": "recurrent", "router_dim": 5})],
)
def test_layers_hand_over_to_each_other_where_only_a_part_of_the_model_is_called(preset, fields):
    """As trainers with fused losses do: they call the decoder and not the whole model."""
    model, ids = build(preset, **fields), tokens()
    decoder = model.get_base_model().get_decoder()
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        with routing_inputs(model, expert_mask=torch.ones(4, dtype=torch.bool)):
            for _ in range(2):
                # Up to rounding: a mask is none of what few tokens take a short cut for.
                torch.testing.assert_close(decoder(input_ids=ids).last_hidden_state, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", ["mole", "smear", "pmoe", "moelora", "polytropon", "x-lora"])
def test_rows_of_a_mixed_batch_equal_those_of_unmixed_ones(second):
    model = build("moelora")
    model.add_adapter("other", config_of(second))
    model.eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".other." in name:
            nn.init.normal_(parameter, std=0.1)
    names, ids = ["other", "default", "__base__", "other", "default"], torch.tensor([0, 1, 2, 2, 0])
    batch = tokens(5)
    got = logits_of(model, batch, adapter_names=names, task_ids=ids)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        rows = [row for row, name in enumerate(names) if name == adapter]
        expected = logits_of(model, batch[rows], task_ids=ids[rows])
        torch.testing.assert_close(got[rows], expected, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(got[2:3], logits_of(model, batch[2:3], task_ids=ids[2:3]), rtol=1e-4, atol=1e-5)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    both = model.generate(input_ids=batch, adapter_names=names, task_ids=ids, **options)
    model.set_adapter("other")
    alone = model.generate(input_ids=batch[[0, 3]], task_ids=ids[[0, 3]], **options)
    assert torch.equal(both[[0, 3]], alone)


@pytest.mark.parametrize("position", ["parallel", "after"])
def test_several_active_adapters_add_up_in_any_order(position):
    model = build("mole", adapter_position=position)
    model.add_adapter("other", config_of("molora", adapter_position=position))
    model.eval()
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        parts = []
        for adapters in (["default"], ["other"], ["default", "other"], ["other", "default"]):
            model.base_model.set_adapter(adapters)
            parts.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(parts[2], parts[0] + parts[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[3], parts[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["moelora", "polytropon-mhr", "mocle", "smear", "x-lora", "glider", "becotta"])
def test_beams_of_a_row_have_its_inputs(preset):
    model = build(preset)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    given = inputs_of(model)
    got = model.generate(input_ids=tokens(), **options, **given)
    for row in range(3):
        alone = {name: value[[row]] for name, value in given.items()}
        expected = model.generate(input_ids=tokens()[[row]], **options, **alone)
        assert torch.equal(got[2 * row : 2 * row + 2], expected)


@pytest.mark.parametrize("preset", ROUTED)
def test_what_is_recorded_is_what_was_decided(preset):
    model = build(preset)
    with record_routing(model) as records:
        logits_of(model)
    static = preset in ("static", "lorahub", "selma", "psec")
    assert bool(records) != static
    for record in records:
        routing = record.routing
        columns = len(record.sizes) + record.null_experts
        assert routing.logits.shape[-1] == routing.selected.shape[-1] == columns
        assert routing.logits.shape[0] == 3
        weights = routing.weights[..., : len(record.sizes)]
        assert not weights[~routing.selected[..., : len(record.sizes)]].any()
        assert torch.isfinite(weights).all()


def t5(preset, **overrides):
    fields = {"target_modules": "all-linear", "init_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    return _drawn(tiny.tiny_t5(), preset, {**fields, **SETTINGS[preset], **overrides})


def bert(preset, **overrides):
    fields = {"target_modules": ["query", "value", "dense"], "exclude_modules": ["pooler.dense"]}
    fields |= {"init_weights": False, "task_type": "SEQ_CLS"}
    return _drawn(tiny.tiny_bert_classifier(), preset, {**fields, **SETTINGS[preset], **overrides})


def _drawn(base, preset, fields):
    model = get_peft_model(base, MoLoraConfig.from_preset(preset, **fields)).eval()
    for name, parameter in model.named_parameters():
        if "molora_router" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


ENCODER = r"encoder\..*\.(q|k|v|o|wi|wo)"


@pytest.mark.parametrize(
    "preset", ["mole", "moelora", "polytropon", "mos", "hydralora", "flylora", "mixlora", "smear"]
)
def test_an_encoder_decoder_generates_alike_with_cache_without_and_without_padding(preset):
    model = t5(preset, **({"target_modules": ENCODER} if preset == "smear" else {}))
    given, mask = inputs_of(model), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    got = model.generate(input_ids=tokens(), attention_mask=mask, **options, **given)
    slow = model.generate(input_ids=tokens(), attention_mask=mask, use_cache=False, **options, **given)
    assert torch.equal(slow, got)
    alone = {name: value[:1] for name, value in given.items()}
    assert torch.equal(model.generate(input_ids=tokens()[:1, :4], **options, **alone), got[:1])
    beams = model.generate(input_ids=tokens(), attention_mask=mask, num_beams=2, **options, **given)
    assert torch.equal(model.generate(input_ids=tokens()[:1, :4], num_beams=2, **options, **alone), beams[:1])
    labels = tokens(seed=8)
    expected = model(input_ids=tokens(), attention_mask=mask, labels=labels, **given).logits[:1]
    single = model(input_ids=tokens()[:1, :4], labels=labels[:1], **alone).logits
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router_level": "sequence"}, "router_level='sequence' cannot route"),
        ({"router_sharing": "model"}, "router_sharing='model' cannot route"),
        ({"router_sharing": "block"}, "router_sharing='block' cannot route"),
        ({"router": "recurrent"}, "router='recurrent' cannot route"),
        ({"router_input": "base"}, "without a separate decoder"),
    ],
    ids=str,
)
def test_what_a_decoder_cannot_do_is_refused(overrides, message):
    with pytest.raises(TargetModulesError, match=message):
        t5("mole", **overrides)
    if "router_input" not in overrides:
        t5("mole", target_modules=ENCODER, **overrides)(input_ids=tokens(), labels=tokens())


@pytest.mark.parametrize("preset", ["mole", "smear", "mocle", "x-lora", "polytropon", "mos"])
def test_an_encoder_classifies_whatever_the_padding_and_the_batch(preset):
    model = bert(preset)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 3:] = 0
    given = inputs_of(model)
    got = logits_of(model, attention_mask=mask, **given)
    for row, length in enumerate((6, 3, 6)):
        alone = {name: value[[row]] for name, value in given.items()}
        expected = logits_of(model, tokens()[[row], :length], **alone)
        torch.testing.assert_close(got[[row]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", ["mole", "moelora", "polytropon", "mos", "hydralora", "flylora", "x-lora", "smear"])
def test_conv1d_models_generate_alike_with_cache_and_without(preset):
    model = build(preset, "gpt2")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **inputs_of(model)}
    got = model.generate(input_ids=tokens(), **options)
    assert torch.equal(model.generate(input_ids=tokens(), use_cache=False, **options), got)


BLOCKS = {
    "gpt2": (lambda **o: build("mixlora", "gpt2", **o), "transformer.h.1.mlp"),
    "t5": (lambda **o: t5("mixlora", **o), "decoder.block.1.layer.2.DenseReluDense"),
    "t5, gated": (
        lambda **o: _drawn(
            tiny.tiny_t5(feed_forward_proj="gated-gelu"),
            "mixlora",
            {"target_modules": "all-linear", "init_weights": False, **SETTINGS["mixlora"], **o},
        ),
        "encoder.block.0.layer.1.DenseReluDense",
    ),
    "llama": (lambda **o: build("mixlora", **o), "model.layers.0.mlp"),
}


@pytest.mark.parametrize("fields", [{}, {"selection": "dense"}, {"selection": "top_p", "renormalize": False}], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_experts_of_a_block_equal_copies_of_the_block_run_one_by_one(kind, fields):
    make, name = BLOCKS[kind]
    model = make(**fields).double()
    block = model.base_model.model.get_submodule(name)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with record_routing(model) as records, torch.no_grad():
        got = block(x)
        (record,) = records
        expected = torch.zeros_like(got)
        for expert in range(4):
            twin = copy.deepcopy(block)
            for part, layer in [item for item in twin.named_modules() if hasattr(item[1], "molora_A")]:
                a, b = layer.matrices("default")
                rows = slice(3 * expert, 3 * expert + 3)
                base = layer.base_layer
                delta = b[:, rows] @ a[rows] * layer.molora_plan["default"].scales[expert]
                base.weight.data += delta.T if layer.fan_in_fan_out else delta
                setattr(twin, part, base)
            expected += record.routing.weights[..., expert : expert + 1] * twin(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_experts_of_a_block_need_all_its_linears():
    with pytest.raises(TargetModulesError, match=r"need all of its linears in `target_modules`: .*down_proj"):
        build("mixlora", target_modules=["gate_proj", "up_proj"])


def test_a_constant_mixture_of_blocks_is_not_merged():
    model = build("mixlora", router="static", selection="dense", router_init="ones", routing_losses={})
    with pytest.raises(MoloraError, match="would silently change the model"):
        model.merge_and_unload()


def test_a_bare_backbone_routes_by_its_own_hidden_states(tmp_path):
    base = methods.base_model("x-lora").model
    model = get_peft_model(base, config_of("x-lora", task_type="FEATURE_EXTRACTION")).eval()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens()).last_hidden_state).all()


def test_imported_adapters_are_banned_like_others(tmp_path):
    folders = [str(save_lora(tmp_path / str(seed), seed, **MIXED[seed])) for seed in range(3)]
    model = compose(methods.base_model("arrow"), folders, "arrow", top_k=1, weights="selected_softmax").eval()
    only = [logits_of(model, expert_mask=torch.arange(3) == expert) for expert in range(3)]
    assert not torch.equal(only[0], only[1])
    torch.testing.assert_close(logits_of(model, expert_weights=torch.eye(3)[2]), only[2])


@pytest.mark.parametrize("preset", ["pmoe", "moelora"])
def test_reentrant_checkpointing_is_refused_where_decisions_cross_layers(preset):
    model = methods.build(preset).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(MoloraError, match="use_reentrant"):
        model(input_ids=methods.tokens(), **methods.inputs_of(model))


def test_a_depth_range_that_contradicts_the_given_layers_is_refused():
    with pytest.raises(TargetModulesError, match=r"means layers \[1\] of this model, and layers_to_transform says 0"):
        methods.build("pmoe", layers_to_transform=0)
