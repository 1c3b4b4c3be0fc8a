"""Which adapters are exactly a sum of `B A`, said by the fields of their `adapter_config.json`.

Only those can be imported as experts without changing what they compute. A field neither known here nor empty is
refused too: a later PEFT may have given it a meaning that changes the equation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from molora.errors import Problem, one_of

_RETRAIN = "Retrain it as a plain LoRA, or leave it out."
_MERGE = "Merge it into the base model (PEFT's `merge_and_unload`) or retrain it as a plain LoRA."

_CHANGES_THE_SUM = {
    "use_dora": f"DoRA rescales the merged weight by a magnitude. {_MERGE}",
    "lora_bias": f"a bias after B is no part of `B A`. {_RETRAIN}",
    "modules_to_save": "fully trained modules cannot be mixed. Leave the adapter out, or retrain it without them.",
    "trainable_token_indices": "trained tokens cannot be mixed. Leave the adapter out, or retrain it without them.",
    "target_parameters": f"LoRA on bare parameters is not adapted by molora. {_RETRAIN}",
    "layer_replication": "it changes the layers of the base model. Leave it out.",
    "use_qalora": f"QA-LoRA pools its input. {_RETRAIN}",
    "alora_invocation_tokens": f"activated LoRA depends on the tokens before it. {_RETRAIN}",
    "use_bdlora": f"BD-LoRA keeps blocks of a factor only. {_RETRAIN}",
    "arrow_config": "this is Arrow's router and not an expert. Give the experts' folders and `preset='arrow'`.",
    "kasa_config": f"KaSA changes the base weight. {_RETRAIN}",
    "monteclora_config": f"MonteCLoRA samples its factors. {_RETRAIN}",
    "megatron_config": f"its factors are cut over processes. {_RETRAIN}",
}
"""Fields of PEFT's LoRA that must be empty, and why."""

_HARMLESS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules task_type use_rslora velora_config bias
    """.split()  # noqa: SIM905  # readable
)
"""Fields that say nothing about what the trained adapter computes, or that are read on their own."""

_EXACT_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Inits that leave the base weight alone. EVA and MiCA only choose a factor; `B A` starts at zero."""

_MOLORA_FIELDS: dict[str, tuple[Any, ...]] = {
    "num_experts": (1,),
    "shared_experts": (0,),
    "null_experts": (0,),
    "expert_layout": ("separate",),
    "expert_activation": (None,),
    "expert_bias": (False,),
    "expert_scope": ("linear",),
    "adapter_position": ("parallel",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
}
"""What a molora adapter must be to be one plain LoRA, default first."""

_GATE_FIELDS: dict[str, tuple[Any, ...]] = {
    "router": ("linear", "none"),
    "gate": ("sigmoid",),
    "selection": ("dense",),
    "weights": ("probability", None),
    "renormalize": (False,),
    "temperature": (1, 1.0),
    "router_bias": (False,),
    "router_level": ("token",),
    "router_sharing": ("none",),
    "router_input": ("module",),
    "router_norm": ("none",),
    "router_noise": (0, 0.0),
    "logit_norm": (None,),
    "score_weight": (None,),
}
"""What its gate must be to be `sigmoid(v · x)`."""


def lora_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield why a config of PEFT's LoRA is not exactly a sum of `B A`."""
    for field, value in config.items():
        if field in _CHANGES_THE_SUM:
            if value not in (None, False, [], {}):
                yield Problem(field, f"got {short(value)}; it must be empty: {_CHANGES_THE_SUM[field]}", where)
        elif field not in _HARMLESS and value:
            yield Problem(
                field,
                f"got {short(value)}; this molora does not know the field, so it may change what the adapter "
                f"computes. Only None and what is empty are allowed. {_RETRAIN}",
                where,
            )
    if config.get("bias", "none") != "none":
        message = (
            f"got {config['bias']!r}; must be 'none': trained biases of the base model cannot be mixed. {_RETRAIN}"
        )
        yield Problem("bias", message, where)
    init = config.get("init_lora_weights", True)
    if init not in _EXACT_INITS:
        yield Problem(
            "init_lora_weights",
            f"got {init!r}, which changed the base weight; allowed are {', '.join(map(repr, _EXACT_INITS))}. PEFT can "
            "write the adapter as a plain LoRA: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.",
            where,
        )


def molora_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield why a config of molora is not one plain LoRA, with or without a sigmoid gate."""
    fields = _MOLORA_FIELDS if config.get("router") == "none" else {**_MOLORA_FIELDS, **_GATE_FIELDS}
    for field, allowed in fields.items():
        value = config.get(field, allowed[0])
        if value not in allowed:
            message = one_of(value, map(str, allowed)) if isinstance(value, str) else f"got {short(value)}."
            yield Problem(
                field,
                f"{message} A molora adapter can be an expert only if it is a single LoRA, where {field} is "
                f"{allowed[0]!r}: train it with `preset: phatgoose-gate` or `preset: lora`.",
                where,
            )


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
