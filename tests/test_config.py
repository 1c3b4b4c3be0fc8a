"""A config that cannot work says so, all at once, with the field, the value, what is allowed and the closest match."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftConfig

from molora import ConfigError, MoLoraConfig, available_presets, presets
from molora.plan import routing_spec
from molora.presets import PRESETS

CONFIGS = Path(__file__).parent.parent / "configs" / "methods"

IMPOSSIBLE = {
    "unknown field": ({"num_expert": 4}, ["num_expert", "Did you mean 'num_experts'"]),
    "unknown name": ({"selection": "topk"}, ["selection", "'topk'", "'top_p'", "Did you mean 'top_k'"]),
    "wrong type": ({"num_experts": "8"}, ["num_experts", "'8'", "integer"]),
    "not a number of experts": ({"num_experts": 0}, ["num_experts", "at least 1"]),
    "no rank": ({"r": 0}, ["r:", "0", "rank of one expert"]),
    "ranks for other experts": ({"r": [1, 2], "num_experts": 3}, ["[1, 2]", "list of 3"]),
    "rank pattern": ({"rank_pattern": {"q_proj": -1}}, ["rank_pattern", "'q_proj'", "-1"]),
    "alpha": ({"lora_alpha": 0}, ["lora_alpha", "above 0"]),
    "alpha pattern": ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern", "'q_proj'"]),
    "dropout": ({"lora_dropout": 1.0}, ["lora_dropout", "[0, 1)"]),
    "temperature": ({"temperature": 1e-38}, ["temperature", "at least 0.0001"]),
    "infinite alpha": ({"lora_alpha": float("inf")}, ["lora_alpha", "above 0"]),
    "infinite loss": ({"routing_losses": {"load_balancing": float("inf")}}, ["load_balancing", "coefficient"]),
    "broken regular expression": ({"target_modules": "q_proj("}, ["target_modules", "no regular expression"]),
    "broken pattern": ({"rank_pattern": {"q_proj(": 3}}, ["rank_pattern", "no regular expression"]),
    "targets of no kind": ({"target_modules": 5}, ["target_modules", "list of module names"]),
    "patterns that are none": (
        {"rank_pattern": None, "alpha_pattern": 3},
        ["rank_pattern", "alpha_pattern", "must map"],
    ),
    "layers by name": ({"layers_to_transform": "a"}, ["layers_to_transform", "layer index"]),
    "one module to save": ({"modules_to_save": "lm_head"}, ["modules_to_save", "list of module names"]),
    "unhashable name": ({"router": ["linear"]}, ["router", "'static'"]),
    "format in words": ({"format_version": "1"}, ["format_version", "integer"]),
    "top-p": ({"selection": "top_p", "top_p": 1.5}, ["top_p", "(0, 1]"]),
    "flag": ({"renormalize": "yes"}, ["renormalize", "true or false"]),
    "more than all": ({"selection": "top_k", "top_k": 9}, ["top_k", "9 of 8"]),
    "top-1 renormalised": ({"selection": "top_k", "top_k": 1}, ["renormalize=False", "no gradient"]),
    "one routed expert": ({"num_experts": 1}, ["num_experts", "router='none'"]),
    "option of another selection": ({"top_k": 2}, ["top_k", "selection='top_k'"]),
    "threshold where there is none": (
        {"selection": "dense", "weights": "probability_minus_threshold"},
        ["weights", "needs a threshold"],
    ),
    "static threshold net": ({"router": "static"}, ["selection", "reads the input"]),
    "no router, many experts": ({"router": "none", "selection": "dense"}, ["router", "single expert"]),
    "loss without router": (
        {"router": "static", "selection": "dense", "routing_losses": {"load_balancing": 1.0}},
        ["routing_losses", "reads the input"],
    ),
    "unknown loss": ({"routing_losses": {"load_balance": 1.0}}, ["Did you mean 'load_balancing'"]),
    "negative loss": ({"routing_losses": {"load_balancing": -1.0}}, ["load_balancing", "at least 0"]),
    "unknown option of a loss": (
        {"routing_losses": {"load_balancing": {"coefficient": 1.0, "scop": "batch"}}},
        ["'scop'", "Did you mean 'scope'"],
    ),
    "pattern without layers": ({"layers_pattern": "h"}, ["layers_pattern", "layers_to_transform"]),
    "newer format": ({"format_version": 2}, ["format 2", "Upgrade molora"]),
}
TOP_K = {"selection": "top_k"}
DENSE = {"selection": "dense", "renormalize": False}
FFN = {"expert_scope": "ffn"}
OWN = {"router": "activation", "gate": "sigmoid", "r": 1, **TOP_K}
IMPOSSIBLE |= {
    # What a router needs
    "a task without tasks": ({"router": "task", **TOP_K}, ["num_tasks", "number of tasks"]),
    "tasks without a reader": ({"num_tasks": 3}, ["num_tasks", "router='task'"]),
    "a sequence without features": (
        {"router": "task", "num_tasks": 2, "router_level": "sequence", **TOP_K},
        ["router_level", "reads the input"],
    ),
    "the base without features": (
        {"router": "task", "num_tasks": 2, "router_input": "base", **TOP_K},
        ["router_input", "reads the input"],
    ),
    "a threshold net of sequences": ({"router_level": "sequence"}, ["router_level", "learned threshold"]),
    "recurrent over sequences": (
        {"router": "recurrent", "router_level": "sequence", **TOP_K},
        ["router_level", "recurrent"],
    ),
    "blend of scores with scores": (
        {"router": "external", "weights": "blend", **TOP_K},
        ["weights", "router of its own"],
    ),
    "scores added to scores": ({"router": "external", "score_weight": 2.0, **TOP_K}, ["score_weight", "no effect"]),
    "nothing to share": ({**OWN, "router_sharing": "block"}, ["router_sharing", "nothing to share"]),
    "sharing over unequal numbers": (
        {"num_experts": [2, 4], "router_sharing": "model", **TOP_K},
        ["router_sharing", "same num_experts"],
    ),
    "own activation, higher rank": ({**OWN, "r": 2}, ["r:", "set r=1"]),
    "own activation, higher rank somewhere": ({**OWN, "rank_pattern": {"q_proj": 2}}, ["r:", "everywhere"]),
    "norm of activations, null experts": (
        {**OWN, "router": "activation_norm", "null_experts": 1},
        ["null_experts", "leave them out"],
    ),
    "own activation, null experts": ({**OWN, "null_experts": 1}, ["null_experts", "leave them out"]),
    "own activation, shared experts": ({**OWN, "shared_experts": 1}, ["shared_experts", "leave them out"]),
    "own activation, one A": ({**OWN, "expert_layout": "shared_A"}, ["expert_layout", "rows of A for each expert"]),
    "activation norm, one A": (
        {"router": "activation_norm", "expert_layout": "shared_A", **TOP_K},
        ["expert_layout", "rows of A for each expert"],
    ),
    # What a selection needs
    "top-1 of magnitude renormalised": ({"selection": "top_k_magnitude", "top_k": 1}, ["renormalize", "no gradient"]),
    "one group renormalised": ({"selection": "grouped_top_1", "expert_groups": 1}, ["renormalize", "no gradient"]),
    "softmax over one": (
        {**TOP_K, "top_k": 1, "weights": "selected_softmax", "renormalize": False},
        ["weights", "no gradient"],
    ),
    "one expert and null ones": (
        {**TOP_K, "num_experts": 1, "null_experts": 3},
        ["num_experts", "routing over one expert"],
    ),
    "groups that do not divide": (
        {"selection": "grouped_top_1", "expert_groups": 3, "renormalize": False},
        ["expert_groups", "do not divide 8"],
    ),
    "capacity without a number": ({**DENSE, "capacity_factor": 1.0}, ["capacity_factor", "selection='top_k'"]),
    "a bias that ranks nothing": ({**DENSE, "balance_bias_rate": 0.1}, ["balance_bias_rate", "no effect"]),
    "a bias of no decision": (
        {"router": "static", **TOP_K, "balance_bias_rate": 0.1},
        ["balance_bias_rate", "router='static'"],
    ),
    "a bias that is not there": ({**TOP_K, "weights": "biased_probability"}, ["weights", "balance_bias_rate"]),
    "null experts, all kept": ({**DENSE, "null_experts": 1}, ["null_experts", "keeps all experts"]),
    "shares of any sign": ({**TOP_K, "gate": "identity"}, ["renormalize", "any sign"]),
    "top-p of any sign": ({"selection": "top_p", "gate": "identity", "renormalize": False}, ["selection", "any sign"]),
    "sparsemixer renormalised": ({"selection": "sparsemixer", "router_jitter": 0.1}, ["renormalize", "estimates"]),
    "sparsemixer without reach": (
        {"selection": "sparsemixer", "renormalize": False},
        ["router_jitter", "without a gradient"],
    ),
    "what sparsemixer does not read": (
        {
            **{"selection": "sparsemixer", "renormalize": False, "router_jitter": 0.1, "gate": "sigmoid"},
            **{"temperature": 2.0, "capacity_factor": 1.0, "expert_dropout": 0.1, "min_logit": 0.0, "weights": "one"},
        },
        [f"{name}: " for name in ("gate", "temperature", "capacity_factor", "expert_dropout", "min_logit", "weights")],
    ),
    "a threshold without gradient": ({"weights": "probability"}, ["weights", "no gradient"]),
    "a router without gradient": ({**TOP_K, "weights": "one"}, ["weights", "no gradient"]),
    "a relu that starts dead": ({**TOP_K, "gate": "relu", "router_init": "zeros"}, ["router_init", "no slope"]),
    "a constant relu that starts dead": (
        {"router": "static", "selection": "dense", "gate": "relu"},
        ["router_init", "'ones'"],
    ),
    "a remainder of nothing": (
        {**TOP_K, "shared_experts": 1, "shared_weight": "remainder"},
        ["shared_weight", "always nothing"],
    ),
    "a remainder of all": (
        {**DENSE, "shared_experts": 1, "shared_weight": "remainder"},
        ["shared_weight", "always nothing"],
    ),
    "a remainder for nobody": ({"shared_weight": "remainder", **TOP_K}, ["shared_weight", "without `shared_experts`"]),
    # Layouts and scopes
    "splits of a constant": (
        {**DENSE, "router": "static", "num_splits": 2, "expert_layout": "factors"},
        ["num_splits", "router='table'"],
    ),
    "splits of no factors": ({"num_splits": 2}, ["num_splits", "expert_layout='factors'"]),
    "factors by token": ({**TOP_K, "expert_layout": "factors"}, ["expert_layout", "once per sequence"]),
    "frozen experts of one A": ({"frozen_experts": 2, "expert_layout": "shared_A"}, ["frozen_experts", "to freeze"]),
    "more frozen than there are": ({"frozen_experts": 9}, ["frozen_experts", "9 of 8"]),
    "more frozen than with shared ones": (
        {"frozen_experts": 11, "shared_experts": 2},
        ["frozen_experts", "11 of 10 experts (`num_experts` and `shared_experts`)"],
    ),
    "pairs that are none": ({"expert_layout": "pairs"}, ["num_experts", r"r[0] · r[1]"]),
    "shards with a router": ({"expert_layout": "shards"}, ["expert_layout", "without router"]),
    "shards with shared experts": (
        {"expert_layout": "shards", "router": "none", "num_experts": 1, "shared_experts": 2, **DENSE},
        ["expert_layout", "shared_experts=0"],
    ),
    "a threshold of blocks": ({**FFN}, ["selection", "without its feed-forward block"]),
    "a capacity of blocks": ({**FFN, **TOP_K, "capacity_factor": 1.0}, ["capacity_factor", "feed-forward block"]),
    "dropout of blocks": ({**FFN, **TOP_K, "expert_dropout": 0.1}, ["expert_dropout", "feed-forward block"]),
    "a relu of blocks": ({**FFN, **TOP_K, "gate": "relu"}, ["gate", "feed-forward block"]),
    "null blocks": ({**FFN, **TOP_K, "null_experts": 1}, ["null_experts", "feed-forward block"]),
    "unequal ranks of blocks": ({**FFN, **TOP_K, "r": [2] * 8}, ["r:", "plain LoRAs outside"]),
    "blocks of every linear": (
        {"expert_scope": "block", "target_modules": "all-linear"},
        ["target_modules", "names no blocks"],
    ),
}

IDLE = {
    "router_bias": {"router": "mlp", "router_bias": True, **TOP_K},
    "router_dim": {"router_dim": 8},
    "router_jitter": {"router": "task", "num_tasks": 2, "router_jitter": 0.1, **TOP_K},
    "router_init": {"router": "static", "router_init": "normal", "selection": "dense"},
    "router_init_range": {"router_init_range": 0.1},
    "init_A_range": {"init_A_range": 0.1},
    "blend_coefficients": {"blend_coefficients": [2.0, 1.0]},
    "pool_rank": {"pool_rank": 2},
    "freeze_A": {"expert_layout": "shards", "router": "none", "num_experts": 1, "freeze_A": True, **DENSE},
    "expert_bias": {"expert_layout": "shards", "router": "none", "num_experts": 1, "expert_bias": True, **DENSE},
    "temperature": {"router": "none", "num_experts": 1, "temperature": 2.0, **DENSE},
    "score_weight": {"router": "none", "num_experts": 1, "score_weight": 2.0, **DENSE},
    "weights": {"router": "none", "num_experts": 1, "weights": "blend", **DENSE},
    "routing_schedules": {"routing_schedules": {"top_k": {"start": 4, "end": 2}}, **DENSE},
}


@pytest.mark.parametrize("field", IDLE)
def test_a_field_that_nothing_reads_is_no_silent_wish(field):
    with pytest.raises(ConfigError, match=rf"{field}: .*has no effect with"):
        MoLoraConfig(**IDLE[field])


def test_a_schedule_goes_no_further_than_there_are_experts():
    with pytest.raises(ConfigError, match="goes beyond 8 experts"):
        MoLoraConfig(selection="top_k", routing_schedules={"top_k": {"start": 9, "end": 2}})


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_config_is_explained(case):
    fields, fragments = IMPOSSIBLE[case]
    with pytest.raises(ConfigError) as caught:
        MoLoraConfig(**fields)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        MoLoraConfig(num_experts=0, gate="soft", lora_dropout=2, routing_losses={"x": 1})
    assert {problem.field for problem in caught.value.problems} == {
        "num_experts",
        "gate",
        "lora_dropout",
        "routing_losses",
    }


@pytest.mark.parametrize(
    "fields", [{"max_threshold": 0.5}, {"selection": "threshold", "threshold": 0.3}], ids=lambda fields: str(fields)
)
def test_a_level_that_can_leave_tokens_without_experts_is_warned_about(fields):
    with pytest.warns(UserWarning, match=r"above 1/num_experts = 0\.125: a token"):
        MoLoraConfig(**fields)


@pytest.mark.parametrize("preset", available_presets())
def test_presets_build_and_survive_a_round_trip(preset, tmp_path):
    config = MoLoraConfig.from_preset(preset, target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "inference_mode": False}


@pytest.mark.parametrize("preset", available_presets())
def test_a_preset_is_explained_complete_and_has_a_run_file(preset):
    assert "arXiv" in PRESETS[preset].__doc__ or preset == "static"
    fields = PRESETS[preset]()
    assert {"router", "selection", "weights", "renormalize"} <= fields.keys()
    assert "gate" in fields or fields["router"] == "none"
    run = (CONFIGS / f"{preset}.yaml").read_text(encoding="utf-8")
    assert f"\npreset: {preset}\n" in run


def test_every_file_of_a_method_is_registered():
    modules = {name.replace("-", "_") for name in PRESETS}
    assert modules == {path.stem for path in Path(presets.__file__).parent.glob("[a-z]*.py")}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PRESETS)


def test_overriding_the_selection_of_a_preset_drops_what_only_the_old_one_read():
    config = MoLoraConfig.from_preset("mole", selection="dense")
    assert (config.selection, config.top_k) == ("dense", None)
    assert config.routing_losses == {}, "balancing selections means nothing where all are selected"
    assert MoLoraConfig.from_preset("recommended", selection="dense").balance_bias_rate is None, "likewise"
    assert routing_spec(MoLoraConfig.from_preset("adamole", selection="top_k")).weights == "probability"
    assert routing_spec(MoLoraConfig.from_preset("mole", selection="adaptive_threshold")).weights != "probability"


def test_overriding_the_selection_of_a_preset_keeps_what_the_new_one_reads_too():
    config = MoLoraConfig.from_preset("flylora", selection="top_k")
    assert (config.top_k, config.weights) == (8, "one")


def test_an_unknown_preset_names_the_closest():
    with pytest.raises(ConfigError, match="Did you mean 'adamole'"):
        MoLoraConfig.from_preset("adamol")


def test_fields_of_a_newer_peft_are_dropped_with_its_warning_when_loading():
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        config = PeftConfig.from_peft_type(
            peft_type="MOLORA", task_type=None, base_model_name_or_path=None, from_the_future=1
        )
    assert isinstance(config, MoLoraConfig)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"routing_schedules": {"top_k": {"start": 2, "end": 1}}}, "end: renormalize: renormalising a single expert"),
        (
            {"routing_schedules": {"top_k": {"start": 1, "end": 2}}},
            "start: renormalize: renormalising a single expert",
        ),
    ],
)
def test_what_a_schedule_leads_to_must_be_possible_too(fields, words):
    """An adapter is saved with the values it was last trained with, and could not be loaded."""
    with pytest.raises(ConfigError) as error:
        MoLoraConfig.from_preset("mole", target_modules=["q_proj"], **fields)
    assert words in str(error.value)
    assert {problem.field for problem in error.value.problems} == {"routing_schedules"}
