"""One training run: what defines it, what it does, and the file it leaves."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import molora
from benchmarks.quality.arms import Arm, trained
from benchmarks.quality.data import Batch, TaskRows, only_task, stream
from benchmarks.quality.scoring import mean_loss, routing_of, score, task_losses
from benchmarks.quality.training import Place, adapted, online_loss, train
from molora.calibration import calibrate_routers, needs_calibration
from molora.writing import new_file

ROUTING_ROWS = 24
"""Validation rows a task whose routing is looked at."""

PROTOCOL = 1
"""Raised when runs mean something else than before, so that old files are not taken for new ones."""


@dataclass(frozen=True)
class Bench:
    """What all runs have in common; a run's file names it, so that equal runs are not run again.

    Attributes:
        model: The base model.
        dtype: Its precision.
        device: Kind of device.
        tasks: Names of the tasks.
        data: Digest of their files.
        steps: Steps of training.
        batch_size: Rows a step.
        max_length: Tokens of the longest row of training and validation.
        validation: Validation rows a task.
        test_rows: Test rows a task.
    """

    model: str
    dtype: str
    device: str
    tasks: tuple[str, ...]
    data: str
    steps: int
    batch_size: int
    max_length: int
    validation: int
    test_rows: int


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: What is trained.
        seed: Draws the adapter and the order of the stream.
        learning_rate: Peak of the schedule; 0 if nothing is trained.
        kind: `tuning` scores validation rows, `final` test rows as well, `initial` trains nothing.
        task: Index of the only task, for arms of one task.
    """

    arm: Arm
    seed: int
    learning_rate: float
    kind: str
    task: int | None = None

    def settings(self, bench: Bench) -> dict[str, Any]:
        """Everything that the result depends on, besides versions and machine."""
        own = {
            "protocol": PROTOCOL,
            "arm": self.arm.name,
            "fields": dict(self.arm.fields),
            "expert_per_task": self.arm.expert_per_task,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "kind": self.kind,
            "only_task": None if self.task is None else bench.tasks[self.task],
        }
        used = vars(bench) | ({} if self.kind == "final" else {"test_rows": 0})
        settings: dict[str, Any] = json.loads(json.dumps({**own, **used}))
        return settings

    def file(self, folder: Path, bench: Bench) -> Path:
        """Where its result is, or will be."""
        settings = self.settings(bench)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        task = f"-{settings['only_task']}" if self.task is not None else ""
        return folder / f"{self.arm.name}{task}-{self.kind}-seed{self.seed}-lr{self.learning_rate:g}-{digest}.json"

    def cost(self, bench: Bench) -> float:
        """Rough work, to start long runs first."""
        rows = bench.steps * bench.batch_size * (self.kind != "initial")
        scored = len(bench.tasks) * (bench.validation + bench.test_rows * (self.kind == "final"))
        share = 1 if self.task is None else 1 / len(bench.tasks)
        return share * (3 * rows + scored) * (1.0 if self.arm.fields.get("preset") == "lora" else 1.4)

    def run(self, bench: Bench, base: nn.Module, rows: TaskRows, place: Place) -> dict[str, Any]:
        """Do the run on a copy of the base model, and return its result, ready for JSON."""
        return run_job(self, bench, base, rows, place)


def run_job(job: Job, bench: Bench, base: nn.Module, rows: TaskRows, place: Place) -> dict[str, Any]:
    """Do a run on a copy of the base model.

    Returns:
        Its result, ready for JSON.
    """
    started = time.perf_counter()
    experts = len(rows.names) if job.arm.expert_per_task else 0
    batches = stream(rows, job.seed, bench.batch_size)
    if job.task is not None:
        batches = only_task(batches, job.task)
    model = adapted(base, job.arm.fields, job.seed).eval()
    calibrate(model, batches, place, job.seed)
    result: dict[str, Any] = {"settings": job.settings(bench), "parameters": trained(model)}
    looked_at = [task[:ROUTING_ROWS] for task in _own(rows.validation, job.task)]
    if job.kind != "tuning" and job.task is None:
        result["routing_initial"] = routing_of(model, looked_at, place, experts=experts)
    if job.kind != "initial":
        began = time.perf_counter()
        steps = train(model, batches, place, learning_rate=job.learning_rate, seed=job.seed, experts=experts)
        result["seconds_training"] = round(time.perf_counter() - began, 2)
        result["online"] = [_curve(step, len(rows.names)) for step in steps]
        result["online_loss"] = online_loss(steps, len(rows.names))
        validation = score(model, _own(rows.validation, job.task), place, experts=experts, choices=False)
        result["validation_loss"] = mean_loss(validation)
        result["validation_losses"] = task_losses(validation)
    if job.kind == "final":
        result["test"] = score(model, _own(rows.test, job.task), place, experts=experts)
        if job.task is None:
            result["routing_final"] = routing_of(model, looked_at, place, experts=experts)
    return finished(result, started)


def finished(result: dict[str, Any], started: float) -> dict[str, Any]:
    """A result with its time and the versions it depends on."""
    result["seconds"] = round(time.perf_counter() - started, 2)
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "molora": molora.__version__,
    }
    return result


def calibrate(model: Any, batches: Sequence[Batch], place: Place, seed: int) -> None:
    """Let routers that start from data have the first rows of the stream; molora's trainers then leave them."""
    if needs_calibration(model):
        model.to(place.device)
        rows = model.peft_config[model.active_adapter].calibration_rows
        items = [item for batch in batches for item in batch][:rows]
        size = max(map(len, batches))
        given = [
            place.collator([item.columns() for item in items[at : at + size]]) for at in range(0, len(items), size)
        ]
        calibrate_routers(model, given, seed=seed)


def _own(tasks: Sequence[list[Any]], task: int | None) -> list[list[Any]]:
    """Rows of all tasks, or of one and none of the others."""
    return [rows if task in (None, at) else [] for at, rows in enumerate(tasks)]


def _curve(step: Sequence[tuple[int, float, int]], tasks: int) -> list[list[float]]:
    """Summed loss and tokens of each task in a step."""
    sums = [[0.0, 0] for _ in range(tasks)]
    for task, loss, tokens in step:
        sums[task][0] += loss
        sums[task][1] += tokens
    return [[round(loss, 4), tokens] for loss, tokens in sums]


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result under its final name at once."""
    with new_file(file) as partial:
        partial.write_text(json.dumps(result) + "\n", encoding="utf-8")


def read_result(file: Path) -> dict[str, Any]:
    """What `write_result` wrote."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result
