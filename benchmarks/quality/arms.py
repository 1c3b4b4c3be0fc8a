"""What is compared: fields of `MoLoraConfig` and a grid of learning rates for each arm.

Further arms come from a YAML or JSON file, `name: {field: value, ..., learning_rates: [...]}`, with the same keys as
here: `preset`, every field of `MoLoraConfig`, and the attributes of `Arm`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from peft import get_peft_model
from torch import nn

from benchmarks.quality.training import config_of
from molora import MoLoraConfig
from molora.errors import ConfigError, Problem, did_you_mean

LORA_RATES = (5e-4, 1e-3, 2e-3)
MIXTURE_RATES = (7.5e-4, 1.5e-3, 3e-3)
"""For a `lora_alpha` of twice the rank, as `top2` has; a token's experts are a quarter of the rank of a LoRA."""

RECOMMENDED_RATES = (3.75e-4, 7.5e-4, 1.5e-3)
"""For the larger `lora_alpha` of the preset `recommended`."""

MIXTURE = {
    "r": 8,
    "num_experts": 8,
    "lora_alpha": 16,
    "router": "linear",
    "gate": "softmax",
    "selection": "top_k",
    "top_k": 2,
    "routing_losses": {"load_balancing": 0.01},
}

ALL_ROUTED = {"num_experts": 8, "shared_experts": 0, "lora_alpha": 64}
"""Of as many experts, none is shared."""


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        name: What it is called.
        fields: Of `MoLoraConfig`, and `preset`. All linears are adapted unless they say otherwise.
        learning_rates: The best of them on the tuning seeds is used.
        equal_parameters_to: The rank is the one at which it has as many trained parameters as this arm.
        equal_active_rank_to: The rank is what a token uses of this arm.
        expert_per_task: One expert for each task, which is chosen by the task of the row. They share the rank.
        one_task: A model for each task, which sees only its rows; their scores are put together.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = MIXTURE_RATES
    equal_parameters_to: str | None = None
    equal_active_rank_to: str | None = None
    expert_per_task: bool = False
    one_task: bool = False


BUILT_IN = [
    Arm("lora", {"preset": "lora"}, LORA_RATES, equal_parameters_to="top2"),
    Arm("lora-active", {"preset": "lora"}, LORA_RATES, equal_active_rank_to="top2"),
    Arm("top2", MIXTURE),
    Arm("adamole", {"preset": "adamole", "r": 8, "lora_alpha": 16}),
    Arm(
        "oracle",
        {"router": "external", "selection": "top_k", "top_k": 1, "weights": "probability", "freeze_router": True},
        equal_parameters_to="top2",
        expert_per_task=True,
    ),
    Arm("single", {"preset": "lora"}, LORA_RATES, equal_parameters_to="top2", one_task=True),
    Arm("molora", {"preset": "recommended"}, RECOMMENDED_RATES),
    Arm("routed", {"preset": "recommended", **ALL_ROUTED}, RECOMMENDED_RATES),
    Arm(
        "thresholds",
        {
            "preset": "recommended",
            **ALL_ROUTED,
            "selection": "adaptive_threshold",
            "top_k": None,
            "experts_per_token": 2.0,
            "weights": "probability",
            "balance_bias_rate": None,
        },
        RECOMMENDED_RATES,
    ),
]
"""The documented comparison. `molora` is the method that the library recommends, `routed` the same without shared
experts, `thresholds` that one with two experts on average, and as each token needs."""


def read_arms(path: Path | None) -> dict[str, Arm]:
    """The built-in arms and those of a file, which replace built-in ones of the same name.

    Raises:
        ConfigError: The file cannot be read, or has keys that are unknown.
    """
    arms = {arm.name: arm for arm in BUILT_IN}
    if path is None:
        return arms
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}", str(path))], "unusable arms") from error
    if not isinstance(content, dict) or not all(isinstance(arm, dict) for arm in content.values()):
        problem = Problem("", "must be a mapping from names of arms to mappings of fields.", str(path))
        raise ConfigError([problem], "unusable arms")
    odd = [name for name in content if not re.fullmatch(r"[\w.+-]+", str(name))]
    problems = [Problem(str(name), "names of arms have letters, digits and . _ + - only.", str(path)) for name in odd]
    problems += [Problem(f"{name}.{key}", why, str(path)) for name, arm in content.items() for key, why in _wrong(arm)]
    if problems:
        raise ConfigError(problems, "unusable arms")
    return arms | {str(name): _arm(str(name), arm) for name, arm in content.items()}


_OWN = [entry.name for entry in fields(Arm) if entry.name not in ("name", "fields")]


def _wrong(arm: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = [*_OWN, "preset", *(entry.name for entry in MoLoraConfig.user_fields())]
    found = [
        (key, f"is no field of an arm or of MoLoraConfig.{did_you_mean(key, known)}")
        for key in arm
        if key not in known
    ]
    rates = arm.get("learning_rates", MIXTURE_RATES)
    usable = isinstance(rates, list | tuple) and len(rates) > 0
    if not usable or not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        # YAML reads 1e-3 as text.
        found.append(
            ("learning_rates", f"got {rates!r}; must be a list of numbers above 0, such as [0.00075, 1.5e-03].")
        )
    return found


def _arm(name: str, given: Mapping[str, Any]) -> Arm:
    own = {key: given[key] for key in _OWN if key in given}
    if "learning_rates" in own:
        own["learning_rates"] = tuple(map(float, own["learning_rates"]))
    return Arm(name, {key: value for key, value in given.items() if key not in own}, **own)


def chosen_arms(arms: Mapping[str, Arm], names: list[str] | None) -> list[Arm]:
    """The arms that were asked for, or all.

    Raises:
        ConfigError: There is no such arm.
    """
    unknown = [name for name in names or () if name not in arms]
    if unknown:
        allowed = f"there are {', '.join(arms)}."
        problems = [Problem("--arms", f"no arm {name!r}; {allowed}{did_you_mean(name, arms)}") for name in unknown]
        raise ConfigError(problems, "unknown arms")
    return [arms[name] for name in names or arms]


def resolved(arms: Mapping[str, Arm], name: str, skeleton: nn.Module, tasks: int) -> Arm:
    """An arm with its rank, and alpha of twice the rank where a rank was computed.

    Args:
        arms: All of them.
        name: The one to resolve.
        skeleton: The base model; may be on the meta device.
        tasks: Number of tasks.

    Raises:
        ConfigError: The config is impossible, or an arm it refers to is unknown.
    """
    arm = arms[name]
    own: dict[str, Any] = {"target_modules": "all-linear", **arm.fields}
    other = arm.equal_parameters_to or arm.equal_active_rank_to
    if arm.expert_per_task:
        own["num_experts"] = tasks
    if other is not None:
        if other not in arms or other == name:
            problem = Problem(name, f"refers to the arm {other!r}; there are {', '.join(arms)}.")
            raise ConfigError([problem], "unusable arms")
        whole = resolved(arms, other, skeleton, tasks)
        if arm.equal_active_rank_to:
            config = config_of(whole.fields)
            own["r"] = int(config.r) * int(config.top_k or 2)  # type: ignore[arg-type]  # both are of one expert
        else:
            own["r"] = equal_rank(skeleton, whole.fields, own) // (tasks if arm.expert_per_task else 1)
        own.setdefault("lora_alpha", 2 * own["r"])
    try:
        config_of(own)
    except ConfigError as error:
        raise ConfigError(
            [Problem(f"{name}: {p.field}", p.message) for p in error.problems], "unusable arms"
        ) from error
    return replace(arm, fields=own)


def equal_rank(skeleton: nn.Module, whole: Mapping[str, Any], own: Mapping[str, Any]) -> int:
    """The rank of one expert at which it has most nearly the parameters of another config."""
    one = {name: value for name, value in own.items() if name not in ("num_experts", "r", "lora_alpha")}
    per_rank = parameters(
        skeleton, {**one, "preset": "lora", "router": "none", "selection": "dense", "r": 1, "top_k": None}
    )
    return max(1, round(parameters(skeleton, whole)["all"] / per_rank["all"]))


def parameters(skeleton: nn.Module, config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of trained parameters: `all`, and those of `router`s and threshold nets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(skeleton), config_of(config), low_cpu_mem_usage=True)
    return trained(model)


_OF_ROUTERS: Callable[[str], bool] = lambda name: any(part in name for part in ("molora_router", "molora_threshold"))  # noqa: E731


def trained(model: nn.Module) -> dict[str, int]:
    """The same of a model."""
    counts = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    return {"all": sum(n for _, n in counts), "router": sum(n for name, n in counts if _OF_ROUTERS(name))}
