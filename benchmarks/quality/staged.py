"""A run in stages: tasks come one after the other, a mixture grows in between, and every stage is scored.

All stages of a run have the same schedule, each with an optimizer of its own. A stage sees only the rows of its tasks,
unless some of earlier ones are replayed.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import set_seed

from benchmarks.quality.data import Batch, Item, TaskRows, stream
from benchmarks.quality.jobs import Bench, Job, calibrate, finished
from benchmarks.quality.scoring import score, task_losses
from benchmarks.quality.shares import expert_shares
from benchmarks.quality.training import Place, adapted, train
from molora.calibration import calibrate_routers
from molora.lifecycle import add_experts, freeze_router

PROTOCOL = 1
"""Raised when runs mean something else than before, so that old files are not taken for new ones."""

STAGE_SEED = 1000
"""Added to a run's seed for every stage after the first."""

SHARE_ROWS = 24
"""Validation rows a task that show which experts it uses."""


@dataclass(frozen=True)
class StagedJob(Job):
    """One run.

    Attributes:
        stages: Indices of the tasks that each stage trains together.
        limits: At most so many rows of each task; empty for all there are.
        passes: Times that a stage goes through its rows.
        grows: Experts added before every stage but the first; the ones that are there are frozen then.
        freezes: Routers are frozen before the first growth, so that old experts are chosen as before.
        replay: Share of a batch that is drawn from rows of earlier stages, in the place of new ones.
    """

    stages: tuple[tuple[int, ...], ...] = ()
    limits: tuple[int, ...] = ()
    passes: int = 1
    grows: int = 0
    freezes: bool = False
    replay: float = 0.0

    def settings(self, bench: Bench) -> dict[str, Any]:
        """Everything that the result depends on, besides versions and machine."""
        own = {
            "staged_protocol": PROTOCOL,
            "stages": [[bench.tasks[task] for task in tasks] for tasks in self.stages],
            "limits": self.limits,
            "passes": self.passes,
            "grows": self.grows,
            "freezes": self.freezes,
            "replay": self.replay,
            "test_rows": bench.test_rows,  # every run scores them
        }
        settings: dict[str, Any] = json.loads(json.dumps(super().settings(bench) | own))
        return settings

    def cost(self, bench: Bench) -> float:
        """Rough work, to start long runs first."""
        full = bench.steps * bench.batch_size
        limits = self.limits or (full,) * len(bench.tasks)
        trained = self.passes * sum(min(full, limits[task]) for task in itertools.chain(*self.stages))
        scored = bench.test_rows * (len(bench.tasks) + sum(len(seen) for seen in self.seen()))
        return 3.0 * trained + scored

    def seen(self) -> list[list[int]]:
        """For each stage the tasks that were trained up to its end."""
        return [sorted(set(itertools.chain(*self.stages[: at + 1]))) for at in range(len(self.stages))]

    def run(self, bench: Bench, base: nn.Module, rows: TaskRows, place: Place) -> dict[str, Any]:
        """Do the run on a copy of the base model, and return its result, ready for JSON."""
        started = time.perf_counter()
        model = adapted(base, self.arm.fields, self.seed).eval().to(place.device)
        result: dict[str, Any] = {"settings": self.settings(bench)}
        result["before"] = losses_of(model, rows, range(len(rows.names)), place)
        result["stages"] = []
        for at, seen in enumerate(self.seen()):
            batches = stage_batches(self, rows, at, bench.batch_size)
            prepare(model, self, at, batches, place)
            train(model, batches, place, learning_rate=self.learning_rate, seed=self.seed + STAGE_SEED * at)
            gc.collect()  # trainers hold themselves in circles, and their optimizers
            result["stages"].append({"steps": len(batches), "losses": losses_of(model, rows, seen, place)})
        result["parameters"] = held(model)
        result["shares"] = expert_shares(model, [task[:SHARE_ROWS] for task in rows.validation], place)
        return finished(result, started)


def stage_batches(job: StagedJob, rows: TaskRows, at: int, batch_size: int) -> list[Batch]:
    """What one stage trains on, in an order that the seed draws.

    Args:
        job: The run.
        rows: The data.
        at: Index of the stage.
        batch_size: Rows a step, replayed ones among them.
    """
    pools = [_limited(job, rows, task) if task in job.stages[at] else [] for task in range(len(rows.names))]
    repeated = [pool * job.passes for pool in pools]
    batches = stream(replace(rows, pools=repeated), job.seed, batch_size)
    earlier = job.seen()[at - 1] if at else []
    old = [item for task in earlier for item in _limited(job, rows, task)]
    if not old or not job.replay:
        return batches
    return with_replay(batches, old, replayed_rows(job.replay, batch_size), job.seed + STAGE_SEED * at)


def _limited(job: StagedJob, rows: TaskRows, task: int) -> list[Item]:
    return rows.pools[task][: job.limits[task]] if job.limits else rows.pools[task]


def replayed_rows(share: float, batch_size: int) -> int:
    """How many rows of a batch are old ones: about the share, at least one, and never all."""
    return min(max(1, round(share * batch_size)), batch_size - 1)


def with_replay(batches: Sequence[Batch], old: Sequence[Item], number: int, seed: int) -> list[Batch]:
    """As many steps as before, the last rows of each batch being old ones; so the last new rows are left out.

    Args:
        batches: Of new rows.
        old: Rows to draw from.
        number: Old rows a batch.
        seed: Draws them.
    """
    draw = random.Random(seed)
    new = (item for batch in batches for item in batch)
    number = min(number, len(old))
    return [[*itertools.islice(new, max(1, len(batch) - number)), *draw.sample(old, number)] for batch in batches]


def prepare(model: PeftModel, job: StagedJob, at: int, batches: Sequence[Batch], place: Place) -> None:
    """Make a model ready for a stage: routers from data before the first, new experts before the others.

    Statistics that routers normalise by are those of the first stage, as old experts' rows depend on them.
    """
    set_seed(job.seed + STAGE_SEED * at)
    if at == 0:
        calibrate(model, batches, place, job.seed)
        return
    if not job.grows:
        return
    if job.freezes:
        freeze_router(model)
    config: Any = model.peft_config[model.active_adapter]
    there = config.num_experts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # outputs change before any training: that is measured here
        add_experts(model, job.grows, freeze_existing=True)
    items = [item for batch in batches for item in batch][: config.calibration_rows]
    new = range(there, there + job.grows)
    given = calibration_batches(items, place)
    calibrate_routers(model, given, experts=list(new), seed=job.seed + STAGE_SEED * at)
    model.eval()


def calibration_batches(items: Sequence[Item], place: Place, size: int = 8) -> list[dict[str, Any]]:
    """Rows as calibration takes them, on the device."""
    return [place.batch(list(items[at : at + size]), 0) for at in range(0, len(items), size)]


def losses_of(model: PeftModel, rows: TaskRows, tasks: Sequence[int], place: Place) -> list[float | None]:
    """Mean loss of an answer token on the test rows of some tasks; None for the others."""
    chosen = [own if task in tasks else [] for task, own in enumerate(rows.test)]
    return task_losses(score(model, chosen, place, choices=False))


def held(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters of an adapter, trained in the last stage or not: `all`, and those of its `router`s."""
    counts = [(name, p.numel()) for name, p in model.named_parameters() if "molora_" in name]
    return {"all": sum(n for _, n in counts), "router": sum(n for name, n in counts if "molora_router" in name)}
