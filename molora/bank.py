"""What an adapter layer holds: the parameters of every adapter on one module, keyed by adapter name.

Parameter names are the checkpoint format; `docs/checkpoint_format.md` lists them with their shapes. Behind each
container follows the adapter's name: `molora_A.<adapter>.weight`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from molora.config import MoLoraConfig
from molora.experts import (
    BankWeight,
    RankMap,
    ShardedWeight,
    ShardPool,
    SplitDown,
    SplitUp,
    init_down,
    init_up,
    shard_index,
)
from molora.groups import RoutingGroup
from molora.layouts import LAYOUTS
from molora.plan import ModulePlan
from molora.quantization import quantization_backend
from molora.routing import ROUTERS, BalanceBias, Blend, Router, RouterSize, RoutingSpec, ThresholdNet
from molora.routing.precision import autocast_enabled
from molora.routing.record import RoutingRecorder
from molora.routing.scope import RoutingScope
from molora.siblings import SharedInput
from molora.watch import Watcher

_FROZEN = ("molora_frozen_A", "molora_frozen_B", "molora_bias")
"""Containers that are never trained by gradients."""


class MoLoraLayer(BaseTunerLayer):
    """What PEFT asks of an adapter layer: containers keyed by adapter name, and how to fill and clear them."""

    adapter_layer_names = (
        "molora_A",
        "molora_B",
        "molora_frozen_A",
        "molora_frozen_B",
        "molora_pool",
        "molora_router",
        "molora_threshold",
        "molora_blend",
        "molora_bias",
    )
    other_param_names = (
        "molora_ranks",
        "molora_dropout",
        "molora_spec",
        "molora_plan",
        "molora_group",
        "molora_input",
        "molora_before",
        "molora_stand_in",
    )
    molora_A: nn.ModuleDict
    molora_B: nn.ModuleDict
    molora_frozen_A: nn.ModuleDict
    molora_frozen_B: nn.ModuleDict
    molora_pool: nn.ModuleDict
    molora_router: nn.ModuleDict
    molora_threshold: nn.ModuleDict
    molora_blend: nn.ModuleDict
    molora_bias: nn.ModuleDict
    molora_ranks: nn.ModuleDict
    molora_dropout: nn.ModuleDict
    training: bool
    routing_recorder: RoutingRecorder | None = None
    routing_scope: RoutingScope | None = None
    watcher: Watcher | None = None
    """Sees what an adapter's experts read and write, such as to fit a plain LoRA to it."""
    routing_name = ""
    module_key = ""
    """Full name of the module in the base model."""

    def _init_containers(self, base_layer: nn.Module, in_features: int, out_features: int, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend(
            self.get_base_layer(), kwargs.get("get_apply_tensor_subclass")
        )
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.molora_ranks = nn.ModuleDict()
        self.molora_dropout = nn.ModuleDict()
        self.molora_spec: dict[str, RoutingSpec] = {}
        self.molora_plan: dict[str, ModulePlan] = {}
        self.molora_group: dict[str, RoutingGroup] = {}
        self.molora_input: dict[str, SharedInput] = {}
        self.molora_before: dict[str, MoLoraLayer] = {}
        self.molora_stand_in: dict[str, tuple[Tensor, Tensor]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        self.kwargs = kwargs
        self.in_features = in_features
        self.out_features = out_features

    def update_layer(
        self,
        adapter_name: str,
        config: MoLoraConfig,
        plan: ModulePlan,
        group: RoutingGroup | None = None,
        pool: ShardPool | None = None,
        inference_mode: bool = False,
        reads: SharedInput | None = None,
    ) -> None:
        """Add an adapter to this module, freshly initialised.

        Args:
            adapter_name: Name of the adapter.
            config: Its configuration.
            plan: What of it concerns this module.
            group: The modules it routes together with; it joins them.
            pool: The pool its vectors are drawn from, for `expert_layout="shards"`; `None` makes one.
            inference_mode: Create the parameters frozen.
            reads: The modules whose input it has too; it joins them.
        """
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name)
            if adapter_name in container:  # of an earlier adapter of this name, which may have been built otherwise
                del container[adapter_name]
        if group is not None:
            group.members.append(self)
            self.molora_group[adapter_name] = group
        if reads is not None:
            reads.members.append(self)
            self.molora_input[adapter_name] = reads
        self.molora_plan[adapter_name] = plan
        self.molora_spec[adapter_name] = plan.spec
        self.molora_ranks[adapter_name] = RankMap(plan.ranks, plan.scales)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.molora_dropout[adapter_name] = dropout.train(self.training)
        self._add_bank(adapter_name, config, plan, pool)
        self._add_router(adapter_name, config, plan, group)
        self.reset_parameters(adapter_name, config)
        frozen = _FROZEN + ("molora_A",) * config.freeze_A + ("molora_router",) * config.freeze_router
        self.frozen_peft_weight_names = {**self.frozen_peft_weight_names, adapter_name: frozen}
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)
        self._freeze_non_trainable_peft_weights(adapter_name)

    def _add_bank(self, name: str, config: MoLoraConfig, plan: ModulePlan, pool: ShardPool | None) -> None:
        size = self.out_features if plan.after else self.in_features
        rows, blocks = LAYOUTS[plan.layout].sizes(plan.ranks, plan.r)
        columns = sum(blocks)
        if plan.layout == "shards":
            self._add_sharded(name, config, plan, pool)
        elif plan.num_splits > 1:
            self.molora_A[name] = SplitDown(rows, size, plan.num_splits)
            self.molora_B[name] = SplitUp(self.out_features, columns, plan.num_splits)
        else:
            frozen = plan.frozen_rank
            if frozen:
                self.molora_frozen_A[name] = BankWeight(frozen, size, config.expert_bias)
                self.molora_frozen_B[name] = BankWeight(self.out_features, frozen)
            if rows > frozen or not frozen:
                self.molora_A[name] = BankWeight(rows - frozen, size, config.expert_bias)
                self.molora_B[name] = BankWeight(self.out_features, columns - frozen)

    def _add_sharded(self, name: str, config: MoLoraConfig, plan: ModulePlan, pool: ShardPool | None) -> None:
        rank, cuts = plan.ranks[0], config.num_shards
        shards = (config.pool_rank or rank) * cuts * plan.of_kind
        if pool is None:
            pool = ShardPool(shards, self.in_features // cuts, self.out_features // cuts)
            self.molora_pool[name] = pool
        for kind, container in (("A", self.molora_A), ("B", self.molora_B)):
            key = f"{self.module_key}.{kind}"
            index = shard_index(key, rank, config.private_rank, cuts, shards, plan.position, plan.of_kind)
            container[name] = ShardedWeight(pool, kind, index)

    def _add_router(self, name: str, config: MoLoraConfig, plan: ModulePlan, group: RoutingGroup | None) -> None:
        router_class = ROUTERS[plan.router]
        if router_class is None:
            return
        follows = group is not None and group.leader is not self
        size = group.feature_size if group is not None else self.out_features if plan.after else self.in_features
        logits = plan.num_experts + plan.spec.null_experts
        if not follows:
            dim = config.router_dim or router_class.default_dim
            sizes = RouterSize(
                size, logits, dim, config.num_tasks or 1, plan.num_splits, config.router_bias, config.router_norm
            )
            self.molora_router[name] = router_class(sizes).train(self.training)
        if follows and group is not None and group.decides_once:
            return
        if plan.spec.selection == "adaptive_threshold":
            self.molora_threshold[name] = ThresholdNet(size, config.router_norm)
        if plan.spec.weights == "blend":
            self.molora_blend[name] = Blend()
        if config.balance_bias_rate is not None:
            self.molora_bias[name] = BalanceBias(logits)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, config: MoLoraConfig) -> None:
        """Draw an adapter's initial weights; nothing to do while they are on the meta device."""
        plan = self.molora_plan[adapter_name]
        if any(p.is_meta for name in self.adapter_layer_names for p in self._parameters_of(name, adapter_name)):
            return
        density = (plan.spec.top_k if plan.spec.selection.startswith("top_k") else 1) / max(1, sum(plan.ranks))
        for downs, ups, blocks in self.banks(adapter_name):
            init_down(downs.weight, config.init_A, config.init_A_range, min(1.0, density))
            init_up(ups.weight, blocks, config.init_weights)
        if adapter_name in self.molora_pool:
            pool = self.molora_pool[adapter_name]
            nn.init.uniform_(pool.weight_A, -(self.in_features**-0.5), self.in_features**-0.5)
            if not config.init_weights:
                nn.init.uniform_(pool.weight_B, -(plan.ranks[0] ** -0.5), plan.ranks[0] ** -0.5)
        if adapter_name in self.molora_router:
            self.molora_router[adapter_name].reset_parameters(config.router_init, config.router_init_range)
        if adapter_name in self.molora_threshold:
            self.molora_threshold[adapter_name].reset_parameters(config.threshold_start)

    def banks(self, name: str) -> list[tuple[Any, Any, tuple[int, ...]]]:
        """The pairs of A and B of an adapter, frozen ones first, with the columns of B that belong together."""
        plan = self.molora_plan[name]
        if plan.layout == "shards":
            return []
        _, blocks = LAYOUTS[plan.layout].sizes(plan.ranks, plan.r)
        if not plan.frozen_rank:
            return [(self.molora_A[name], self.molora_B[name], blocks)]
        frozen = next(n for n in range(len(blocks) + 1) if sum(blocks[:n]) == plan.frozen_rank)
        found = [(self.molora_frozen_A[name], self.molora_frozen_B[name], blocks[:frozen])]
        if name in self.molora_A:
            found.append((self.molora_A[name], self.molora_B[name], blocks[frozen:]))
        return found

    def _parameters_of(self, container: str, adapter_name: str) -> list[nn.Parameter]:
        modules = getattr(self, container)
        return list(modules[adapter_name].parameters()) if adapter_name in modules else []

    def router_of(self, adapter_name: str) -> Router:
        """The router an adapter uses here, which another module may hold."""
        group = self.molora_group.get(adapter_name)
        holder = self if group is None else group.leader
        return holder.molora_router[adapter_name]

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether an adapter was put on this module."""
        return adapter_name in self.molora_plan

    def hidden(self, adapter_name: str, x: Tensor) -> Tensor:
        """`A x` over all experts, `[..., in]` to `[..., R]`."""
        banks = (self.molora_frozen_A, self.molora_A)
        parts = [self._multiply(bank[adapter_name], x) for bank in banks if adapter_name in bank]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def output(self, adapter_name: str, gated: Tensor) -> Tensor:
        """`B h` over all experts, `[..., R]` to `[..., out]`."""
        if adapter_name not in self.molora_frozen_B:
            return self._multiply(self.molora_B[adapter_name], gated)
        if adapter_name not in self.molora_B:
            return self._multiply(self.molora_frozen_B[adapter_name], gated)
        rank = self.molora_plan[adapter_name].frozen_rank
        frozen = self._multiply(self.molora_frozen_B[adapter_name], gated[..., :rank])
        return frozen + self._multiply(self.molora_B[adapter_name], gated[..., rank:])

    def _multiply(self, matrix: Any, x: Tensor) -> Tensor:
        # TRL rounds what it trains beside quantised weights and leaves what is frozen, so dtypes may differ.
        return matrix(x if autocast_enabled(x) else self._cast_input_dtype(x, matrix.dtype))

    def down_matrix(self, adapter_name: str) -> Tensor:
        """A copy of A over all experts, `[R, in]`; right while the layer runs, also where weights are sharded."""
        return torch.cat(
            [bank[adapter_name](None) for bank in (self.molora_frozen_A, self.molora_A) if adapter_name in bank]
        )

    def up_matrix(self, adapter_name: str) -> Tensor:
        """A copy of B over all experts, `[out, C]`; as for A."""
        banks = [bank for bank in (self.molora_frozen_B, self.molora_B) if adapter_name in bank]
        return torch.cat([bank[adapter_name](None) for bank in banks], dim=1)

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A `[R, in]` and B `[out, R]` over all experts."""
        downs = [bank[adapter_name] for bank in (self.molora_frozen_A, self.molora_A) if adapter_name in bank]
        ups = [bank[adapter_name] for bank in (self.molora_frozen_B, self.molora_B) if adapter_name in bank]
        return torch.cat([part.matrix() for part in downs]), torch.cat([part.matrix() for part in ups], dim=1)
