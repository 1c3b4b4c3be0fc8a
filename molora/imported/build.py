"""From adapter folders and a preset to the config of the mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from molora.errors import ConfigError, Problem
from molora.imported.folder import ImportedLora, read_loras
from molora.presets import preset_fields

LORAS = "imported_loras"
"""Attribute of a config that was built from adapters: the adapters, whose weights a model with it starts from."""

Config = TypeVar("Config", bound=Any)
"""`MoLoraConfig`; not imported, since its `from_adapters` calls this module."""

_FROM_ADAPTERS = (
    "imported_experts",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "depth_range",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)
_OF_FURTHER_EXPERTS = ("r", "lora_alpha")

_EXACT: dict[str, tuple[Any, ...]] = {
    "expert_layout": ("separate", "factors"),
    "expert_activation": (None,),
    "expert_bias": (False,),
    "expert_scope": ("linear",),
    "adapter_position": ("parallel",),
    "freeze_A": (False,),
}


def config_from_adapters(
    config_cls: type[Config],
    adapters: Sequence[str | Path | ImportedLora],
    preset: str,
    overrides: dict[str, Any],
) -> Config:
    """Build the config of a mixture whose first experts are trained adapters, in the order given.

    The experts are frozen unless the preset or `frozen_experts` says otherwise. A `num_experts` above the number of
    adapters adds new experts behind them, of rank `r`.

    Args:
        config_cls: `MoLoraConfig`.
        adapters: Adapter folders, or adapters already read.
        preset: The method that mixes them.
        overrides: Fields of the config; they win over the preset.

    Raises:
        ConfigError: If an adapter cannot be an expert exactly, if they do not fit together, or an override contradicts
            them.
    """
    loras = read_loras(adapters)
    check_shapes(loras)
    own = preset_fields(preset, {})
    problems = list(_contradictions(own, overrides, len(loras)))
    if problems:
        raise ConfigError(problems, "what the adapters decide cannot be set")
    fields = {
        "num_experts": len(loras),
        "frozen_experts": own.get("frozen_experts", len(loras)),
        "imported_experts": [lora.description for lora in loras],
        "target_modules": sorted({module for lora in loras for module in lora.factors}),
        **{name: value for name, value in overrides.items() if name not in _FROM_ADAPTERS},
    }
    routed = fields["num_experts"]
    fewer = isinstance(routed, int) and own.get("top_k", 0) > routed
    if fewer and overrides.get("selection", own["selection"]) == own["selection"]:
        # A preset's k is its paper's; with fewer experts all of them are kept.
        fields.setdefault("top_k", routed)
    config = config_cls.from_preset(preset, **fields)
    problems = [*_inexact(config, loras), *_unequal_ranks(config, loras), *_missing_gates(config, loras)]
    if problems:
        raise ConfigError(problems, "adapters that this mixture cannot hold")
    # Beside the fields, so that it is never saved: whoever puts the config on a model finds the weights here.
    setattr(config, LORAS, loras)
    return config


def check_shapes(loras: Sequence[ImportedLora]) -> None:
    """Refuse adapters of different base models.

    Raises:
        ConfigError: Naming the first module whose input or output differs, for each adapter.
    """
    first: dict[str, tuple[tuple[int, int], str]] = {}
    problems = []
    for lora in loras:
        for module, (a, b, _) in lora.factors.items():
            shape = (a.shape[1], b.shape[0])
            expected, name = first.setdefault(module, (shape, lora.name))
            if shape != expected:
                message = (
                    f"maps {shape[0]} to {shape[1]}, but {expected[0]} to {expected[1]} in {name}; adapters can only "
                    "be mixed if they were trained on one base model."
                )
                problems.append(Problem(module, message, lora.name))
                break
    if problems:
        raise ConfigError(problems, "adapters of different base models")


def _contradictions(own: dict[str, Any], overrides: dict[str, Any], number: int) -> Iterator[Problem]:
    """Yield overrides that say otherwise than the adapters."""
    for field in _FROM_ADAPTERS:
        if overrides.get(field):
            yield Problem(field, "follows from the adapters; leave it out.")
    if own.get("num_experts") == 1 and number > 1:
        message = f"has one expert, but {number} adapters are given; give one, or another preset."
        yield Problem("preset", message)
    shared = overrides.get("shared_experts", own.get("shared_experts", 0))
    total = overrides.get("num_experts", number)
    if not isinstance(total, int) or not isinstance(shared, int):
        return  # the config says what is wrong with them
    if total + shared < number:
        got = f"got {total}" + f" and {shared} shared ones" * bool(shared)
        message = f"{got}, but {number} adapters are given; leave it out, or add new experts behind them."
        yield Problem("num_experts", message)
    if total + shared == number:
        for field in _OF_FURTHER_EXPERTS:
            if field in overrides:
                message = "holds for new experts only, and there are none: adapters keep their own. Leave it out."
                yield Problem(field, message)


def _inexact(config: Any, loras: Sequence[ImportedLora]) -> Iterator[Problem]:
    """Yield choices under which an expert would no longer compute what its adapter does."""
    for field, allowed in _EXACT.items():
        value = getattr(config, field)
        if value not in allowed:
            names = " or ".join(map(repr, allowed))
            yield Problem(field, f"got {value!r}; trained adapters keep their meaning with {names} only.")
    if config.router in ("arrow", "prototype"):
        for field, needed in (("router_sharing", "none"), ("router_input", "module")):
            if getattr(config, field) != needed:
                message = f"got {getattr(config, field)!r}; a router made from the adapters needs {needed!r}."
                yield Problem(field, message)
    if config.router_norm != "none" and config.num_experts == 1 and any(lora.gates for lora in loras):
        message = "the gate that came with the adapter reads its input as it is; set 'none'."
        yield Problem("router_norm", f"got {config.router_norm!r}; {message}")


def _unequal_ranks(config: Any, loras: Sequence[ImportedLora]) -> Iterator[Problem]:
    """Yield why factors cannot be added up."""
    if config.expert_layout != "factors":
        return
    for module in sorted(config.target_modules or ()):
        ranks = {lora.name: len(lora.factors[module][0]) if module in lora.factors else 0 for lora in loras}
        if len(set(ranks.values())) > 1:
            given = ", ".join(f"{rank} in {name}" for name, rank in ranks.items())
            yield Problem(
                "expert_layout",
                f"'factors' adds up factors, so all adapters need one rank; {module} has {given} (0: not adapted). "
                "Set expert_layout='separate' to add up their products, or give adapters of equal rank and targets.",
            )
            return


def _missing_gates(config: Any, loras: Sequence[ImportedLora]) -> Iterator[Problem]:
    """Yield adapters without the gate that a router is made of."""
    without = [lora for lora in loras if not lora.gates]
    # A router that is trained may start anywhere, as long as it does for all.
    if config.router != "prototype" or (len(without) == len(loras) and not config.freeze_router):
        return
    for lora in without:
        yield Problem(
            "",
            "has no gate, which this router is made of. Train it with the LoRA frozen, on the LoRA's own data: "
            "`molora compose OUT --adapter DIR --preset phatgoose-gate`, then `molora train`.",
            lora.name,
        )
