"""What the config of a MixLoRA or MoE-PEFT checkpoint means, and what of it molora cannot express.

The fields of `adapter_config.json`, as TUDB-Labs/MixLoRA 0.2.3 and TUDB-Labs/MoE-PEFT 2.x read them:

| field | meaning | in molora |
|---|---|---|
| `peft_type`, `routing_strategy` | which method | the preset |
| `num_experts`, `top_k`, `top_p` | of the router | the same |
| `temperature` of `mixlora-dynamic` | divides probabilities, not logits | refused unless 0 or 1 |
| `r`, `lora_alpha`, `use_rslora` | of every LoRA | the same |
| `expert_lora` | those of the experts of `mixlora`, where they differ | `r`; attention by `rank_pattern` |
| `use_dora` | weights of unit norm times a magnitude, which the checkpoint does not hold | refused |
| `act_fn` | activation of the experts' block; MoE-PEFT always writes the base model's | refused if it is another |
| `target_modules` | last names, a list or a mapping to true and false | the same |
| `router_aux_loss_coef`, `router_loss`, `router_init_range`, `jitter_noise`, `lora_dropout` | training | the same |
| `lora_init` | initial values | left out |
| `sparse_step`, `expert_capacity`, `ffn_dropout`, `router_z_loss_coef` | of the refused `mixlora-switch` | left out |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from molora.errors import Problem, one_of
from molora.imported.foreign_files import unusable

STRATEGIES = {
    "MIXLORA": {"mixlora": "mixlora", "mixtral": "mixlora", "mixlora-dynamic": "mixlora-dynamic"},
    "LORAMOE": {"loramoe": "loramoe"},
    "MOLA": {"mola": "mola"},
}
"""`peft_type`, then `routing_strategy`, to molora's preset. `mixtral` is what m-LoRA called top-k routing."""

_KNOWN = frozenset(
    """
    act_fn base_model_name_or_path bias expert_capacity expert_lora ffn_dropout inference_mode jitter_noise lora_alpha
    lora_dropout lora_init name num_experts peft_type r router_aux_loss_coef router_init_range router_loss
    router_z_loss_coef routing_strategy sparse_step target_modules task_name task_type temperature top_k top_p use_dora
    use_rslora
    """.split()  # noqa: SIM905  # readable
)


@dataclass(frozen=True)
class LoraNumbers:
    """Rank and scale of the LoRAs of one kind."""

    r: int
    lora_alpha: float
    use_rslora: bool

    def alpha_under(self, use_rslora: bool) -> float:
        """The `lora_alpha` that gives the same scale under another rule."""
        if use_rslora == self.use_rslora:
            return self.lora_alpha
        return self.lora_alpha * (math.sqrt(self.r) if self.use_rslora else 1 / math.sqrt(self.r))


@dataclass(frozen=True)
class MoeSettings:
    """A checkpoint's config, read.

    Attributes:
        preset: The preset that computes the same.
        num_experts: E.
        plain: Numbers of the LoRAs outside the mixture.
        expert: Numbers of the experts' LoRAs.
        targets: Last names of the modules that may be adapted.
        fields: Further fields of molora's config.
        act_fn: Activation of the experts' block, if the config names one.
        notes: What a user should know.
    """

    preset: str
    num_experts: int
    plain: LoraNumbers
    expert: LoraNumbers
    targets: frozenset[str]
    fields: dict[str, Any]
    act_fn: str | None
    notes: tuple[str, ...]


def read_settings(config: Mapping[str, Any], where: str) -> MoeSettings:
    """Read the config of a MixLoRA or MoE-PEFT checkpoint.

    Args:
        config: The content of `adapter_config.json`, with a `peft_type` of `STRATEGIES`.
        where: The folder, for messages.

    Raises:
        ConfigError: Listing every field that has no exact equivalent.
    """
    kind = config["peft_type"]
    allowed = STRATEGIES[kind]
    strategy = config.get("routing_strategy", kind.lower() if kind != "MIXLORA" else None)
    problems = [Problem(field, message, where) for field, message in _mistakes(config, kind, strategy)]
    if str(strategy) not in allowed and not str(strategy).endswith("switch"):
        problems.insert(0, Problem("routing_strategy", one_of(strategy, allowed), where))
    if problems:
        raise unusable(problems)
    preset = allowed[str(strategy)]
    plain = LoraNumbers(config["r"], config["lora_alpha"], bool(config.get("use_rslora", False)))
    own = {**config, **(config.get("expert_lora") or {})} if kind == "MIXLORA" else config
    expert = LoraNumbers(own["r"], own["lora_alpha"], bool(own.get("use_rslora", False)))
    return MoeSettings(
        preset,
        config["num_experts"],
        plain,
        expert,
        frozenset(_targets(config["target_modules"])),
        _fields(config, preset),
        config.get("act_fn"),
        tuple(_notes(config, preset, plain, expert)),
    )


def _mistakes(config: Mapping[str, Any], kind: str, strategy: object) -> Iterator[tuple[str, str]]:
    """Yield field and message of everything that cannot be read or expressed."""
    if str(strategy).endswith("switch"):
        yield (
            "routing_strategy",
            f"got {strategy!r}; its released code drops tokens by capacity and skips the block at inference, so there "
            "is nothing to be equal to. Retrain with 'mixlora' routing.",
        )
    for field in ("num_experts", "r"):
        if not _is_whole(config.get(field)) or config[field] < 1:
            yield field, f"got {config.get(field)!r}; must be a whole number of at least 1."
    yield from _scale_mistakes(config, "")
    yield from _routing_mistakes(config, kind, strategy)
    if config.get("bias", "none") != "none":
        yield "bias", f"got {config['bias']!r}; must be 'none', trained biases are not known to the authors' code."
    expert = config.get("expert_lora")
    if expert is not None and (not isinstance(expert, Mapping) or kind != "MIXLORA"):
        yield "expert_lora", f"got {expert!r}; must be a mapping, and is read for MIXLORA only."
    elif expert:
        yield from _scale_mistakes({"lora_alpha": 1, **expert}, "expert_lora.")
        if not _is_whole(expert.get("r", 1)) or expert.get("r", 1) < 1:
            yield "expert_lora.r", f"got {expert['r']!r}; must be a whole number of at least 1."
    targets = config.get("target_modules")
    if not isinstance(targets, list | Mapping) or not _targets(targets):
        yield "target_modules", f"got {targets!r}; must list last names of modules, or map them to true."
    if config.get("act_fn") is not None and not isinstance(config["act_fn"], str):
        yield "act_fn", f"got {config['act_fn']!r}; must be the name of an activation."
    for field, value in config.items():
        if field not in _KNOWN and value not in (None, False, 0, "", [], {}):
            yield field, f"got {value!r}; the authors' code does not know this field, so it may mean anything."


def _scale_mistakes(config: Mapping[str, Any], before: str) -> Iterator[tuple[str, str]]:
    if not _is_number(config.get("lora_alpha")):
        yield f"{before}lora_alpha", f"got {config.get('lora_alpha')!r}; must be a number."
    if config.get("use_dora"):
        yield (
            f"{before}use_dora",
            "got true; DoRA's magnitudes are not in the checkpoint (the authors' code computes them anew from the "
            "base weights), and molora has no DoRA experts. Retrain it without.",
        )


def _routing_mistakes(config: Mapping[str, Any], kind: str, strategy: object) -> Iterator[tuple[str, str]]:
    experts = config.get("num_experts")
    if strategy in ("mixlora", "mixtral", "mola"):
        top_k = config.get("top_k", 2)
        if not _is_whole(top_k) or not 1 <= top_k <= (experts if _is_whole(experts) else top_k):
            yield "top_k", f"got {top_k!r}; must be a whole number from 1 to num_experts, {experts!r}."
    if strategy == "mixlora-dynamic":
        top_p = config.get("top_p", 0.8)
        if not _is_number(top_p) or not 0 < top_p <= 1:
            yield "top_p", f"got {top_p!r}; must be above 0 and at most 1."
        temperature = config.get("temperature", 0.0)
        if temperature not in (0, 1):
            yield (
                "temperature",
                f"got {temperature!r}; the authors' code divides probabilities by it, and so the output of the whole "
                "block, which molora's temperature does not. Only 0 and 1, which change nothing, are imported.",
            )
    for field in ("router_aux_loss_coef", "router_init_range", "jitter_noise", "lora_dropout"):
        value = config.get(field)
        if value is not None and (not _is_number(value) or value < 0):
            yield field, f"got {value!r}; must be a number of at least 0."


def _targets(targets: Any) -> list[str]:
    chosen = [name for name, wanted in targets.items() if wanted] if isinstance(targets, Mapping) else targets
    return [name for name in chosen if isinstance(name, str)]


def _fields(config: Mapping[str, Any], preset: str) -> dict[str, Any]:
    """Fields of molora's config that routing and training need."""
    fields: dict[str, Any] = {"num_experts": config["num_experts"], "lora_dropout": config.get("lora_dropout") or 0.0}
    if preset in ("mixlora", "mola"):
        fields["top_k"] = config.get("top_k", 2)
    if preset == "mixlora-dynamic":
        fields["top_p"] = config.get("top_p", 0.8)
    balances = preset != "loramoe" and config.get("router_loss", preset != "mola")
    coefficient = config.get("router_aux_loss_coef", 0.001) or 0.0
    fields["routing_losses"] = {"load_balancing": coefficient} if balances and coefficient else {}
    if preset.startswith("mixlora"):
        fields["router_init_range"] = config.get("router_init_range") or 0.02
        fields["router_jitter"] = config.get("jitter_noise") or 0.0
    if config["num_experts"] == 1 or fields.get("top_k") == 1:
        # The weight of the one kept expert is 1 whatever the router says, so nothing could train it.
        fields |= {"freeze_router": True, "routing_losses": {}}
    return fields


def _notes(config: Mapping[str, Any], preset: str, plain: LoraNumbers, expert: LoraNumbers) -> Iterator[str]:
    if preset == "mixlora-dynamic":
        yield (
            "Top-p: where a sum of probabilities hits top_p to the last bit, the authors' code keeps one expert more."
        )
    if plain != expert:
        yield (
            "The experts have the rank and scale of expert_lora, as in MoE-PEFT, which trained them; the package "
            "mixlora 0.2.3 reads the field and ignores it."
        )
    if preset.startswith("mixlora") and config.get("jitter_noise"):
        yield (
            "jitter_noise became router_jitter, on the router's input in training; theirs also changes what the "
            "experts read, and in mixlora 0.2.3 inference too."
        )
    if preset.startswith("mixlora") and config.get("lora_dropout"):
        yield "mixlora 0.2.3 keeps dropout on at inference; equal to it without dropout, as in MoE-PEFT."


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
