"""`MoLoraConfig`: every choice of a mixture of LoRA experts, as a PEFT config."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

from molora.config_checks import FORMAT_VERSION, NAMES, check_types
from molora.config_rules import advice, check_combination
from molora.errors import ConfigError, Problem, did_you_mean
from molora.imported import config_from_adapters
from molora.peft_type import MOLORA
from molora.presets import preset_fields
from molora.routing.routers import reads


class UnknownFieldError(ConfigError, TypeError):
    """A keyword that is no field of the config. Also a `TypeError`, which PEFT expects when it loads newer configs."""


def _field(default: Any, help_text: str) -> Any:
    metadata = {"help": help_text}
    if isinstance(default, dict | list):
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

    # The experts
    r: int | list[int] = _field(4, "Rank of one expert; a list gives each expert its own.")
    num_experts: int | list[int] = _field(
        8,
        "Number of routed experts in a module. A list goes with depth, the layers in as many equal parts.",
    )
    shared_experts: int = _field(0, "Further experts, behind the routed ones, that every token uses.")
    shared_weight: str = _field("one", f"How much a shared expert counts: {_names('shared_weight')}.")
    null_experts: int = _field(0, "Experts that do nothing, so that a token may choose fewer real ones.")
    frozen_experts: int = _field(0, "The first so many experts are not trained.")
    expert_layout: str = _field("separate", f"How experts share matrices: {_names('expert_layout')}.")
    num_splits: int = _field(1, "Parts of input and output with weights of their own, for `expert_layout: factors`.")
    num_shards: int = _field(1, "Shards a vector is put together from, for `expert_layout: shards`.")
    pool_rank: int | None = _field(None, "Rank whose parameters the pools hold per module, for `shards`. Default r.")
    private_rank: int = _field(0, "Ranks of each module whose shards no other one uses, for `shards`.")
    expert_activation: str | None = _field(None, f"Between A and B: {_names('expert_activation')}. Default: nothing.")
    expert_bias: bool = _field(False, "Add a learned bias to `A x`.")
    freeze_A: bool = _field(False, "Keep A at its initial values.")
    init_A: str = _field("kaiming_uniform", f"How A is drawn: {_names('init_A')}.")
    init_A_range: float = _field(0.02, "Standard deviation of `init_A: normal`.")
    init_weights: bool = _field(True, "True starts as an exact identity; False draws B at random, for tests.")
    lora_alpha: float = _field(8, "Scale of an expert is `lora_alpha / r`, r its own rank.")
    lora_dropout: float = _field(0.0, "Dropout of the experts; the router sees the input undropped.")
    dropout_position: str = _field("input", f"What `lora_dropout` drops: {_names('dropout_position')}.")
    use_rslora: bool = _field(False, "Scale by `lora_alpha / sqrt(r)` instead.")
    scale_by: str = _field("expert", f"Whose rank divides `lora_alpha`: {_names('scale_by')}.")
    imported_experts: list[dict[str, Any]] | None = _field(
        None, "Where experts came from, their ranks and scales; written by `MoLoraConfig.from_adapters`."
    )
    # Where they are
    target_modules: list[str] | str | None = _field(
        None, "Modules to adapt: a list of name endings, one regular expression, or `all-linear`."
    )
    exclude_modules: list[str] | str | None = _field(None, "Modules to leave alone, as in `target_modules`.")
    expert_scope: str = _field("linear", f"What an expert belongs to: {_names('expert_scope')}.")
    ffn_modules: list[str] = _field(
        ["mlp", "DenseReluDense", "feed_forward", "ffn"], "Names of feed-forward blocks, for `expert_scope: ffn`."
    )
    adapter_position: str = _field("parallel", f"Whether experts read input or output: {_names('adapter_position')}.")
    depth_range: list[float] | None = _field(None, "Adapt only layers in this part of the depth, such as [0.5, 1].")
    layers_to_transform: list[int] | int | None = _field(None, "Adapt only the layers with these indices.")
    layers_pattern: list[str] | str | None = _field(None, "Name of the layer list, if it is not a common one.")
    rank_pattern: dict[str, Any] = _field({}, "Module name or regular expression to the `r` used there.")
    alpha_pattern: dict[str, Any] = _field({}, "Module name or regular expression to the `lora_alpha` used there.")
    # The router
    router: str = _field("linear", f"Where the logits come from: {_names('router')}.")
    router_dim: int | None = _field(None, "Size of the router's inner space, for routers that have one.")
    router_bias: bool = _field(False, "Bias on the logits of `linear` and `task` routers.")
    router_input: str = _field("module", f"Whose features the router reads: {_names('router_input')}.")
    router_level: str = _field("token", f"What is routed as one: {_names('router_level')}.")
    router_sharing: str = _field("none", f"Which modules share a router: {_names('router_sharing')}.")
    router_norm: str = _field(
        "none", f"What `router: linear` does to its input, by statistics of training rows: {_names('router_norm')}."
    )
    router_init: str = _field("kaiming_uniform", f"How a router is drawn: {_names('router_init')}.")
    router_init_range: float = _field(0.02, "Standard deviation of `router_init: normal`.")
    router_confidence: float | None = _field(
        None, "Mean largest probability that a router with `router_norm` is scaled to at its start. Default: as drawn."
    )
    calibration_rows: int = _field(96, "Training rows that routers take statistics and start from.")
    router_lr_ratio: float = _field(1.0, "In molora's trainers, the learning rate of routers over the others'.")
    freeze_router: bool = _field(False, "Do not train routers.")
    num_tasks: int | None = _field(None, "Number of tasks, clusters or domains, for routers that read `task_ids`.")
    score_weight: float | None = _field(None, "Add the external `expert_scores` to the logits, this many times.")
    # From logits to weights
    gate: str = _field("softmax", f"How logits become probabilities: {_names('gate')}.")
    temperature: float = _field(1.0, "Divides the router logits.")
    logit_norm: float | None = _field(None, "Standardise each token's logits over experts and scale them by this.")
    router_noise: float = _field(0.0, "Standard deviation of Gaussian noise on the logits, in training.")
    router_jitter: float = _field(0.0, "Multiply router features by U(1-x, 1+x) in training. `sparsemixer`: reach.")
    selection: str = _field("adaptive_threshold", f"Which experts a token keeps: {_names('selection')}.")
    top_k: int | None = _field(None, "Experts kept by `selection: top_k`. Default 2.")
    top_p: float | None = _field(None, "Probability kept by `selection: top_p`. Default 0.8.")
    threshold: float | None = _field(None, "Least probability kept by `selection: threshold`. Default 1/num_experts.")
    max_threshold: float | None = _field(
        None,
        "Upper limit of the threshold learned by `selection: adaptive_threshold`. Default 1/num_experts, or "
        "1/experts_per_token where that is more.",
    )
    threshold_start: float | None = _field(
        None, "Share of `max_threshold` at which learned thresholds start, for all tokens. Default: drawn, about half."
    )
    experts_per_token: float | None = _field(
        None, "Experts that `adaptive_threshold` shall keep on average; molora's trainers move the thresholds."
    )
    top_gap: float | None = _field(None, "Lead that makes one expert enough for `selection: top_1_or_2`. Default 0.1.")
    expert_groups: int | None = _field(None, "Groups of experts of `selection: grouped_top_1`. Default 2.")
    min_logit: float | None = _field(None, "Leave out experts whose logit is below this, at inference.")
    expert_dropout: float = _field(0.0, "Share of experts whose probability is zeroed, per decision, in training.")
    capacity_factor: float | None = _field(
        None, "In training an expert takes at most this many times its even share of a batch's tokens."
    )
    balance_bias_rate: float | None = _field(
        None, "Rank experts with a bias that molora's trainers move by this much a step, towards even load."
    )
    weights: str | None = _field(
        None, f"How much a kept expert counts: {_names('weights')}. Default: what the selection's paper uses."
    )
    renormalize: bool = _field(True, "Make the weights of the kept experts sum to one.")
    blend_coefficients: list[float] = _field([1.0, 1.0], "Factors of router and scores, for `weights: blend`.")
    # Training
    routing_losses: dict[str, Any] = _field(
        {}, "Losses that molora's trainers add: name to coefficient, or to a mapping with `coefficient` and options."
    )
    routing_schedules: dict[str, Any] = _field(
        {}, "Choices that change over training: field to a mapping with `start`, `end`, `until` and `shape`."
    )
    bias: str = _field("none", f"Which biases of the base model are trained: {_names('bias')}.")
    fan_in_fan_out: bool = _field(False, "The base weight is stored as [in, out]; found out by itself for Conv1D.")
    modules_to_save: list[str] | None = _field(None, "Further modules to train fully and save with the adapter.")
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
        if self.experts_per_token is not None and self.max_threshold is None:
            # Probabilities sum to one, so thresholds up to here can leave so few experts. Saved, as readers need it.
            self.max_threshold = 1 / self.experts_per_token
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # what PEFT's matching expects
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]  # as above
        for sentence in advice(self):
            warnings.warn(sentence, UserWarning, stacklevel=2)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config, and the model card if an adapter's weights lie in the folder.

        PEFT calls this for each adapter that it saves, on the main process, when the weights are there.

        Args:
            save_directory: The folder.
            **kwargs: As in PEFT.
        """
        super().save_pretrained(save_directory, **kwargs)
        # A card reads what reports read, and that needs configs, and seconds to import.
        from molora.card.job import update_card
        from molora.card.training import attached_state

        update_card(save_directory, self, attached_state(self))

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

    @classmethod
    def from_adapters(cls, adapters: Sequence[str], preset: str = "arrow", **overrides: Any) -> MoLoraConfig:
        """Build the config of a mixture of adapters that are already trained.

        The experts keep their own ranks, scales and target modules. A model that the config is put on, by
        `get_peft_model` or a trainer, starts with their weights.

        Args:
            adapters: Folders of PEFT LoRA adapters, or molora adapters with one expert.
            preset: The method that mixes them.
            **overrides: Any field of the config; wins over the preset.

        Raises:
            ConfigError: If a folder holds no adapter that can be imported exactly, or the result is impossible.
        """
        return config_from_adapters(cls, adapters, preset, overrides)

    @property
    def is_routed(self) -> bool:
        """Whether the gate depends on what is passed in; if so there is no single weight to merge."""
        of_scores = self.weights == "blend" or self.score_weight is not None
        of_input = bool(reads(self.router)) or self.selection == "adaptive_threshold"
        return of_input or of_scores or self.has_nonlinear_experts

    @property
    def has_nonlinear_experts(self) -> bool:
        """Whether an expert alone is no linear map of the module's input."""
        spans = self.adapter_position == "after" or self.expert_scope == "ffn"
        return bool(self.expert_activation or self.expert_bias) or spans


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
