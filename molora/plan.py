"""What one module gets: the choices of the config that depend on where a module is, resolved."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from molora.config import MoLoraConfig
from molora.config_losses import reads_hidden, view_dropout
from molora.errors import ConfigError, Problem
from molora.experts import lora_scale
from molora.imported import by_pattern, expert_at
from molora.routing import RoutingSpec, reads


@dataclass(frozen=True)
class ModulePlan:
    """The resolved choices of one adapter for one module.

    Attributes:
        r: Rank as in the config, after `rank_pattern`.
        ranks: Rank of each expert of the bank, shared ones last; may be 0 for imported experts.
        scales: Scale of each.
        num_experts: Routed experts, E.
        frozen_rank: Ranks of the experts that are not trained.
        router: Name in `ROUTERS`; `none` for a module with a plain LoRA beside a mixture elsewhere.
        layout: Name in `LAYOUTS`.
        spec: How logits become weights.
        level: `token` or `sequence`: what is routed as one.
        router_input: `module` or `base`: whose features the router reads.
        after: The experts read the module's output.
        activation: Name in `ACTIVATIONS`, or `None`.
        num_splits: Parts of input and output with weights of their own.
        num_tasks: Tasks the router knows, if it reads them.
        position: Which of the adapted modules of its kind this is, counted from 0; for `layout="shards"`.
        of_kind: How many modules there are of its kind.
        gives_hidden: Whether a routing loss reads `A x`.
        drops_hidden: Dropout is on `A x`, not on the input.
        is_common: Whether it is the common case that kernels are written for, see `molora.standard`.
        reads: What the weights depend on: `input`, `hidden`, `task`, `scores`, `state`; empty if they are fixed.
        per_sequence: Whether one decision holds for all tokens of a row.
    """

    r: int | list[int]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    num_experts: int
    frozen_rank: int
    router: str
    layout: str
    spec: RoutingSpec
    level: str = "token"
    router_input: str = "module"
    after: bool = False
    activation: str | None = None
    num_splits: int = 1
    num_tasks: int = 1
    position: int = 0
    of_kind: int = 1
    gives_hidden: bool = False
    drops_hidden: bool = False
    is_common: bool = field(init=False)
    reads: frozenset[str] = field(init=False)
    per_sequence: bool = field(init=False)

    def __post_init__(self) -> None:
        # Asked for in every forward pass.
        reads = _reads(self.router, self.spec)
        by_row = self.level == "sequence" or not reads & {"input", "hidden", "state"}
        object.__setattr__(self, "reads", reads)
        plain = self.layout == "separate" and self.activation is None and self.num_splits == 1 and not self.frozen_rank
        by_token = self.router == "linear" and self.level == "token" and self.router_input == "module"
        even = len(set(self.ranks)) == 1 and len(set(self.scales)) == 1 and self.ranks[0] > 0
        object.__setattr__(self, "is_common", plain and by_token and even and not self.after)
        object.__setattr__(self, "per_sequence", self.router != "none" and by_row)

    @property
    def is_constant(self) -> bool:
        """Whether the weights are the same whatever is passed in, if only because there is nothing to choose from."""
        spec = self.spec
        alone = self.num_experts == 1 and not spec.null_experts and spec.gate == "softmax" and spec.min_logit is None
        whole = spec.selection in ("dense", "top_k", "top_p") and spec.weights in ("probability", "selected_softmax")
        full = not spec.shared_experts or spec.shared_weight == "one"
        return not self.reads or (alone and whole and full and self.num_splits == 1)

    @property
    def bank_experts(self) -> int:
        """Experts of the bank, shared ones included."""
        return len(self.ranks)


def plan_module(
    config: MoLoraConfig, key: str, num_layers: int | None, plain: bool = False, kind: tuple[int, int] = (0, 1)
) -> ModulePlan:
    """Resolve the choices for one module.

    Args:
        config: The adapter's configuration.
        key: Full name of the module in the base model.
        num_layers: Layers of the model, if known.
        plain: The module gets a plain LoRA of rank `r`, as attention does in MixLoRA.
        kind: Position of the module among those of its kind, and their number.
    """
    r = by_pattern(config.rank_pattern, key, config.r)
    lora_alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
    if plain:
        scale = lora_scale(lora_alpha, r, config.use_rslora)
        spec, drops = routing_spec(config, 1), config.dropout_position == "hidden"
        return ModulePlan(r, (r,), (scale,), 1, 0, "none", "separate", spec, drops_hidden=drops)
    num_experts = experts_at(config.num_experts, layer_of(key), num_layers)
    ranks, scales = _bank(config, key, r, lora_alpha, num_experts)
    frozen = sum(ranks[: config.frozen_experts])
    spec = routing_spec(config, num_experts)
    return ModulePlan(
        r,
        ranks,
        scales,
        num_experts,
        frozen,
        config.router,
        config.expert_layout,
        spec,
        level=config.router_level,
        router_input=config.router_input,
        after=config.adapter_position == "after",
        activation=config.expert_activation,
        num_splits=config.num_splits,
        num_tasks=config.num_tasks or 1,
        position=kind[0],
        of_kind=kind[1],
        gives_hidden=reads_hidden(config),
        drops_hidden=config.dropout_position == "hidden",
    )


def routing_reads(config: MoLoraConfig) -> frozenset[str]:
    """What the weights of an adapter's mixtures depend on, as `ModulePlan.reads`."""
    return _reads(config.router, routing_spec(config))


def _reads(router: str, spec: RoutingSpec) -> frozenset[str]:
    if router == "none":
        return frozenset()
    of_threshold = {"input"} if spec.selection == "adaptive_threshold" else set()
    of_weights = {"scores"} if spec.weights == "blend" or spec.score_weight is not None else set()
    return reads(router) | of_threshold | of_weights


def routing_spec(config: MoLoraConfig, num_experts: int | None = None) -> RoutingSpec:
    """The routing choices with every default filled in.

    Args:
        config: The adapter's configuration.
        num_experts: E of the module; that of the config by default.
    """
    experts = num_experts or most_experts(config.num_experts)
    minus_threshold = config.selection == "adaptive_threshold"
    return RoutingSpec(
        gate=config.gate,
        selection=config.selection,
        weights=config.weights or ("probability_minus_threshold" if minus_threshold else "probability"),
        renormalize=config.renormalize,
        temperature=config.temperature,
        top_k=config.top_k or 2,
        top_p=config.top_p or 0.8,
        threshold=config.threshold or 1 / experts,
        max_threshold=config.max_threshold or 1 / experts,
        top_gap=0.1 if config.top_gap is None else config.top_gap,
        expert_groups=config.expert_groups or 2,
        min_logit=config.min_logit,
        null_experts=config.null_experts,
        shared_experts=config.shared_experts,
        shared_weight=config.shared_weight,
        score_weight=config.score_weight,
        blend_coefficients=(config.blend_coefficients[0], config.blend_coefficients[1]),
        logit_norm=config.logit_norm,
        router_noise=config.router_noise,
        router_jitter=config.router_jitter,
        expert_dropout=config.expert_dropout,
        capacity_factor=config.capacity_factor,
        view_dropout=view_dropout(config),
    )


def most_experts(num_experts: int | Sequence[int]) -> int:
    """The number of routed experts where there are most."""
    return num_experts if isinstance(num_experts, int) else max(num_experts)


def experts_at(num_experts: int | Sequence[int], layer: int | None, num_layers: int | None) -> int:
    """Number of experts of one layer: a list is spread over the depth in equal parts (MoLA, arXiv 2402.08562)."""
    if isinstance(num_experts, int):
        return num_experts
    if layer is None or not num_layers:
        return num_experts[-1]
    return num_experts[min(layer * len(num_experts) // num_layers, len(num_experts) - 1)]


def layer_of(key: str) -> int | None:
    """Index of the layer a module is in: the first number in its name, or `None`."""
    found = re.search(r"\.(\d+)(\.|$)", "." + key)
    return int(found[1]) if found else None


def _bank(
    config: MoLoraConfig, key: str, r: int | list[int], lora_alpha: float, num_experts: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ranks and scales of all experts of a bank."""
    if config.expert_layout == "pairs":
        ranks: tuple[int, ...] = (1,) * num_experts
    elif isinstance(r, int):
        ranks = (r,) * (num_experts + config.shared_experts)
    else:
        ranks = tuple(r)
        if len(ranks) != num_experts + config.shared_experts:
            message = f"{key} has {num_experts} experts, and its ranks are {list(ranks)}; give one for each."
            raise ConfigError([Problem("rank_pattern", message)], "invalid MoLoraConfig")
    total = sum(ranks)
    scales = tuple(
        lora_scale(lora_alpha, total if config.scale_by == "total" else rank, config.use_rslora) for rank in ranks
    )
    imported = [expert_at(description, key) for description in config.imported_experts or ()]
    known = len(imported)
    return (
        tuple(rank for rank, _ in imported) + ranks[known:],
        tuple(scale for _, scale in imported) + scales[known:],
    )
