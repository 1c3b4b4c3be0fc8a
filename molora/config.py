"""`MoLoraConfig`: every choice of a mixture of LoRA experts, as a PEFT config."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from molora.config_checks import FORMAT_VERSION, NAMES, advice, check_combination, check_types
from molora.errors import ConfigError, Problem, did_you_mean
from molora.experts import expert_ranks, lora_scale
from molora.peft_type import MOLORA
from molora.presets import preset_fields
from molora.routing import INPUT_DEPENDENT_ROUTERS, RoutingSpec


class UnknownFieldError(ConfigError, TypeError):
    """A keyword that is no field of the config. Also a `TypeError`, which PEFT expects when it loads newer configs."""


def _field(default: Any, help_text: str) -> Any:
    metadata = {"help": help_text}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _names(of: str) -> str:
    return ", ".join(f"`{name}`" for name in NAMES[of])


@dataclass
class MoLoraConfig(PeftConfig):
    """Configuration of a mixture of LoRA experts on the linear layers of a frozen model.

    Every adapted linear computes `y = W0 x + B((scale · gate(x)) ⊙ (A x))` over one packed bank: `A [R, in]`,
    `B [out, R]`, with R the sum of the experts' ranks. How a token's gate comes about is four independent choices,
    `router`, `gate`, `selection` and `weights`. The defaults are adaptive thresholds (AdaMoLE, arXiv 2405.00361).

    The meaning of each field is in its `help` metadata, printed by `molora schema`. Fields that PEFT's LoRA also has
    mean the same here.

    Raises:
        ConfigError: Listing every impossible value or combination at once.

    Example:
        >>> from molora import MoLoraConfig
        >>> config = MoLoraConfig.from_preset("adamole", r=4, num_experts=4, target_modules=["q_proj", "v_proj"])
        >>> config.selection
        'adaptive_threshold'
    """

    r: int | list[int] = _field(4, "Rank of one expert; a list gives each expert its own.")
    num_experts: int = _field(8, "Number of experts in each adapted linear.")
    target_modules: list[str] | str | None = _field(
        None, "Modules to adapt: a list of name endings, one regular expression, or `all-linear`."
    )
    exclude_modules: list[str] | str | None = _field(None, "Modules to leave alone, as in `target_modules`.")
    lora_alpha: float = _field(8, "Scale of an expert is `lora_alpha / r`, r its own rank.")
    lora_dropout: float = _field(0.0, "Dropout on the input of the experts; the router sees the input undropped.")
    use_rslora: bool = _field(False, "Scale by `lora_alpha / sqrt(r)` instead.")
    router: str = _field("linear", f"Where the logits come from: {_names('router')}.")
    gate: str = _field("softmax", f"How logits become probabilities: {_names('gate')}.")
    selection: str = _field("adaptive_threshold", f"Which experts a token keeps: {_names('selection')}.")
    weights: str | None = _field(
        None, f"How much a kept expert counts: {_names('weights')}. Default: what the selection's paper uses."
    )
    renormalize: bool = _field(True, "Make the weights of the kept experts sum to one.")
    temperature: float = _field(1.0, "Divides the router logits.")
    top_k: int | None = _field(None, "Experts kept by `selection: top_k`. Default 2.")
    top_p: float | None = _field(None, "Probability kept by `selection: top_p`. Default 0.8.")
    threshold: float | None = _field(None, "Least probability kept by `selection: threshold`. Default 1/num_experts.")
    max_threshold: float | None = _field(
        None, "Upper limit of the threshold learned by `selection: adaptive_threshold`. Default 1/num_experts."
    )
    router_init: str = _field("kaiming_uniform", f"How a linear router is drawn: {_names('router_init')}.")
    router_init_range: float = _field(0.02, "Standard deviation of `router_init: normal`.")
    routing_losses: dict[str, Any] = _field(
        {}, "Losses that molora's trainers add: name to coefficient, or to a mapping with `coefficient` and options."
    )
    init_weights: bool = _field(True, "True starts as an exact identity; False draws B at random, for tests.")
    bias: str = _field("none", f"Which biases of the base model are trained: {_names('bias')}.")
    fan_in_fan_out: bool = _field(False, "The base weight is stored as [in, out]; found out by itself for Conv1D.")
    modules_to_save: list[str] | None = _field(None, "Further modules to train fully and save with the adapter.")
    layers_to_transform: list[int] | int | None = _field(None, "Adapt only the layers with these indices.")
    layers_pattern: list[str] | str | None = _field(None, "Name of the layer list, if it is not a common one.")
    rank_pattern: dict[str, Any] = _field({}, "Module name or regular expression to the `r` used there.")
    alpha_pattern: dict[str, Any] = _field({}, "Module name or regular expression to the `lora_alpha` used there.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _field(
        None, "Token indices of the embedding to train, as in PEFT."
    )
    format_version: int = _field(FORMAT_VERSION, "Version of the checkpoint format; written by molora.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOLORA
        problems = list(check_types(self)) or list(check_combination(self))
        if problems:
            raise ConfigError(problems, "invalid MoLoraConfig")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # what PEFT's matching expects
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]  # as above
        for sentence in advice(self):
            warnings.warn(sentence, UserWarning, stacklevel=2)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> MoLoraConfig:
        """Build the config of a published method.

        Args:
            name: One of `molora.available_presets()`.
            **overrides: Any field of the config; wins over the preset.

        Raises:
            ConfigError: If the preset or a field is unknown, or the result impossible.
        """
        return cls(**preset_fields(name, overrides))

    @classmethod
    def user_fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Fields a person sets; those that PEFT or molora fill in are left out."""
        internal = {entry.name for entry in dataclasses.fields(PeftConfig)} - {"task_type"} | {"format_version"}
        return tuple(entry for entry in dataclasses.fields(cls) if entry.name not in internal)

    @property
    def is_routed(self) -> bool:
        """Whether the gate depends on the token; if so there is no single weight to merge."""
        return self.router in INPUT_DEPENDENT_ROUTERS

    def routing_spec(self) -> RoutingSpec:
        """The routing choices with every default filled in."""
        minus_threshold = self.selection == "adaptive_threshold"
        return RoutingSpec(
            gate=self.gate,
            selection=self.selection,
            weights=self.weights or ("probability_minus_threshold" if minus_threshold else "probability"),
            renormalize=self.renormalize,
            temperature=self.temperature,
            top_k=self.top_k or 2,
            top_p=self.top_p or 0.8,
            threshold=self.threshold or 1 / self.num_experts,
            max_threshold=self.max_threshold or 1 / self.num_experts,
        )

    def bank_layout(self, r: int | list[int], lora_alpha: float) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ranks and scales of the experts of one linear, whose `r` and `lora_alpha` the patterns may have changed."""
        ranks = expert_ranks(r, self.num_experts)
        return ranks, tuple(lora_scale(lora_alpha, rank, self.use_rslora) for rank in ranks)


def _refuse_unknown_fields(cls: type) -> None:
    """Replace the generated `__init__` by one that names the closest field when a keyword is unknown."""
    generated = cls.__init__  # type: ignore[misc]  # the dataclass decorator wrote it
    names = [entry.name for entry in dataclasses.fields(cls)]

    @functools.wraps(generated)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [key for key in kwargs if key not in names]
        if unknown:
            problems = [
                Problem(key, "got an unexpected keyword argument." + did_you_mean(key, names)) for key in unknown
            ]
            raise UnknownFieldError(problems, f"{cls.__name__} has no such field")
        generated(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[misc]


_refuse_unknown_fields(MoLoraConfig)
