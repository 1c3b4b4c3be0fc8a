"""LoRAs of one task each, trained apart and put together without further training."""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from benchmarks.quality.data import TaskRows
from benchmarks.quality.jobs import Bench, Job
from benchmarks.quality.staged import (
    StagedJob,
    calibration_batches,
    finished,
    held,
    losses_of,
    prepare,
    stage_batches,
)
from benchmarks.quality.training import Place, adapted, train
from molora.calibration import calibrate_routers
from molora.compose import compose

PROTOCOL = 1
"""Raised when runs mean something else than before."""

ROUNDS = 2
"""Times that each expert's row is made: its offset depends on the other rows, which come later in the first round."""

FEW = 32
"""Rows of each task that a calibrated router sees."""

WAYS: dict[str, dict[str, Any]] = {
    "mean": {"preset": "static"},
    "arrow": {"preset": "arrow"},
    "calibrated": {
        "preset": "lora-bank",
        "freeze_router": True,
        "router_norm": "standardize",
        "router_init": "clusters",
        "router_bias": True,
        "router_level": "sequence",  # tokens that all tasks share would go to the expert whose row is made last
    },
}
"""How they are put together: in equal shares, by their own directions, by a router that saw few rows of each task."""


@dataclass(frozen=True)
class ComposedJob(Job):
    """One run: a LoRA for each task, and every way of putting them together."""

    def settings(self, bench: Bench) -> dict[str, Any]:
        """Everything that the result depends on, besides versions and machine."""
        own = {"composed_protocol": PROTOCOL, "ways": WAYS, "rounds": ROUNDS, "few": FEW, "test_rows": bench.test_rows}
        settings: dict[str, Any] = json.loads(json.dumps(super().settings(bench) | own))
        return settings

    def cost(self, bench: Bench) -> float:
        """Rough work, to start long runs first."""
        return len(bench.tasks) * (3.0 * bench.steps * bench.batch_size + bench.test_rows * (1 + len(WAYS)))

    def run(self, bench: Bench, base: nn.Module, rows: TaskRows, place: Place) -> dict[str, Any]:
        """Do the run on copies of the base model, and return its result, ready for JSON."""
        started = time.perf_counter()
        alone: list[float | None] = []
        ways: dict[str, list[float | None]] = {}
        sizes: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as scratch:
            folders = [Path(scratch) / name for name in rows.names]
            for task, folder in enumerate(folders):
                alone.append(self._train(task, folder, bench, base, rows, place))
                gc.collect()
            for name, how in WAYS.items():
                model = composed_model(base, folders, how, rows, place, self.seed)
                ways[name] = losses_of(model, rows, range(len(rows.names)), place)
                sizes[name] = held(model)["all"]
        result = {"settings": self.settings(bench), "alone": alone, "ways": ways, "parameters": sizes}
        return finished(result, started)

    def _train(
        self, task: int, folder: Path, bench: Bench, base: nn.Module, rows: TaskRows, place: Place
    ) -> float | None:
        """Train the LoRA of a task into a folder, and give its loss on that task."""
        model = adapted(base, self.arm.fields, self.seed + task).eval().to(place.device)
        job = StagedJob(self.arm, self.seed, self.learning_rate, self.kind, stages=((task,),))
        batches = stage_batches(job, rows, 0, bench.batch_size)
        prepare(model, job, 0, batches, place)
        train(model, batches, place, learning_rate=self.learning_rate, seed=self.seed)
        model.save_pretrained(str(folder))
        return losses_of(model, rows, [task], place)[task]


def composed_model(
    base: nn.Module, folders: Sequence[Path], how: dict[str, Any], rows: TaskRows, place: Place, seed: int
) -> Any:
    """A mixture of trained LoRAs on a copy of the base; its router, if it reads data, is made from a few rows a task.

    Args:
        base: Left as it is.
        folders: Of the adapters, in the order of the tasks.
        how: A preset, and fields that are different.
        rows: The data.
        place: Where to run.
        seed: Of everything that is drawn.
    """
    set_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = compose(copy.deepcopy(base), list(folders), **how).eval().to(place.device)
    if "router_norm" in how:
        few = [pool[:FEW] for pool in rows.pools]
        calibrate_routers(model, calibration_batches([item for own in few for item in own], place), seed=seed)
        for _ in range(ROUNDS):
            for task, own in enumerate(few):
                calibrate_routers(model, calibration_batches(own, place), experts=[task], seed=seed)
    return model.eval()
