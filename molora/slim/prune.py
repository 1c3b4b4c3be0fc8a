"""Take experts or ranks out of the modules where calibration data does not use them. Routing stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from molora.errors import ConfigError, Problem
from molora.slim.adapter import Adapter
from molora.slim.changes import Slimmed, compared
from molora.slim.experts import Expert, experts_of, rebuilt
from molora.slim.refusals import PRUNE, RANKS, check_slimming
from molora.slim.statistics import ModuleStatistics

Usage = Mapping[str, ModuleStatistics]
"""What calibration data shows of each module, as `expert_usage` gives it."""


def prune_experts(adapter: Adapter, usage: Usage, below: float = 0.0) -> Slimmed:
    """Empty experts that calibration data rarely selects, each in the modules where that is so.

    An emptied expert has rank 0 and keeps its row of the router, so what the others get does not change. Tokens that
    never select it are computed exactly as before. Shared experts stay, and every module keeps its most used expert.

    Args:
        adapter: The adapter.
        usage: Its statistics on calibration data.
        below: An expert goes if fewer than this share of tokens select it; where all are always selected
            (`selection: dense`), if it gets less than this share of their weight. 0 takes those that are never used.

    Raises:
        ConfigError: If experts of this adapter cannot be emptied one by one, or `below` is no share.
    """
    check_slimming(adapter.config, PRUNE)
    if not 0 <= below < 1:
        raise ConfigError([Problem("below", f"got {below!r}; must be a share in [0, 1).")], "cannot prune experts")
    experts, removed, masses = experts_of(adapter), {}, {}
    for module, own in experts.items():
        if adapter.plan(module).router == "none":
            continue
        gone = _unused(adapter, module, usage[module], below, [expert.rank for expert in own])
        removed[module] = gone
        masses[module] = float(usage[module].mass(adapter.plan(module).num_experts)[gone].sum())
        experts[module] = [expert.only([]) if index in gone else expert for index, expert in enumerate(own)]
    new = rebuilt(adapter, experts)
    slim = Slimmed(new, "experts pruned", {"below": below}, compared(adapter, new, removed, masses))
    slim.exact = not any(float(usage[module].weight[gone].sum()) for module, gone in removed.items())
    return slim


def prune_ranks(adapter: Adapter, usage: Usage, keep_energy: float) -> Slimmed:
    """Take out the ranks that contribute least, module by module.

    A rank's energy is `E[(gate · scale · h)²] · ‖b‖²`: the mean square of what it adds to the output by itself. Where
    experts share A, a row of A goes for all of them at once.

    Args:
        adapter: The adapter.
        usage: Its statistics on calibration data.
        keep_energy: Share of each module's energy that the ranks kept have at least.

    Raises:
        ConfigError: If ranks of this adapter cannot be taken out, or `keep_energy` is no share.
    """
    check_slimming(adapter.config, RANKS)
    if not 0 < keep_energy <= 1:
        problem = Problem("keep_energy", f"got {keep_energy!r}; must be a share in (0, 1].")
        raise ConfigError([problem], "cannot prune ranks")
    experts, removed = experts_of(adapter), {}
    for module, own in experts.items():
        energies = rank_energies(own, usage[module])
        shares = adapter.plan(module).layout == "shared_A"
        if shares:
            energies = energies.unflatten(0, (len(own), -1)).sum(dim=0)
        kept = most_energy(energies, keep_energy)
        removed[module] = sorted(set(range(len(energies))) - set(kept))
        starts = [0] if shares else [sum(expert.rank for expert in own[:index]) for index in range(len(own))]
        experts[module] = [
            expert.only([rank - start for rank in kept if 0 <= rank - start < expert.rank])
            for expert, start in zip(own, starts * len(own) if shares else starts, strict=True)
        ]
    new = rebuilt(adapter, experts)
    return Slimmed(new, "ranks pruned", {"keep_energy": keep_energy}, compared(adapter, new, removed))


def rank_energies(experts: list[Expert], usage: ModuleStatistics) -> Tensor:
    """Mean square of what each column of B adds to the output, `[C]`, in fp64."""
    ups = torch.cat([expert.up for expert in experts], dim=1).double()
    return usage.energy / max(usage.tokens, 1) * ups.square().sum(dim=0)


def most_energy(energies: Tensor, share: float) -> list[int]:
    """The fewest indices that together have a share of the energy, in order; at least one, if there are some.

    Args:
        energies: `[C]`, none below 0.
        share: In (0, 1]. With 1, only those without any are left out.
    """
    if not len(energies):
        return []
    order = energies.argsort(descending=True, stable=True)
    reached = energies[order].cumsum(dim=0)
    wanted = share * reached[-1] * (1 - 1e-12 * (share < 1))
    needed = int((reached < wanted).sum()) + 1
    if share == 1:
        needed = max(int((energies > 0).sum()), 1)
    return sorted(order[:needed].tolist())


def _unused(adapter: Adapter, module: str, usage: ModuleStatistics, below: float, ranks: list[int]) -> list[int]:
    """The routed experts of a module that go, if they are not empty already."""
    plan = adapter.plan(module)
    share = usage.mass(plan.num_experts) if adapter.config.selection == "dense" else usage.usage[: plan.num_experts]
    gone = [index for index in range(plan.num_experts) if share[index] < below or share[index] == 0]
    if not sum(rank for index, rank in enumerate(ranks[: plan.num_experts]) if index not in gone):
        best = max((index for index in gone if ranks[index]), key=lambda index: float(share[index]), default=None)
        gone = [index for index in gone if index != best]
    return [index for index in gone if ranks[index]]
