"""The studies: which runs each consists of.

Arms are those of the bench; `--arms_file` replaces `lora`, `molora` and `grown`. Nothing is tuned here: an arm's
learning rate is the one in the middle of its grid, unless `--learning_rates` gives another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from benchmarks.quality.arms import LORA_RATES, RECOMMENDED_RATES, Arm, resolved
from benchmarks.quality.composed import ComposedJob
from benchmarks.quality.jobs import Job
from benchmarks.quality.staged import StagedJob
from molora.errors import MoloraError, did_you_mean

REPLAY = 0.25
"""Share of a batch that `replay` draws from earlier tasks."""

GROWTH = 2
"""Experts that a mixture grows by for a task, and has for each task it starts with."""

SCARCE_PASSES = 8
"""Times that a model of one scarce task goes through its few rows; every other run sees each row once."""

GROWN = Arm(
    "grown",
    {
        "r": 7,
        "num_experts": GROWTH,
        "lora_alpha": 56,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "router_norm": "standardize",
        "router_init": "clusters",
        "router_confidence": 0.7,
        "router_bias": True,
    },
    RECOMMENDED_RATES,
)
"""What grown mixtures are for the first task; every further one brings as many experts again."""

LORA_OF_TASK = Arm("lora-of-task", {"preset": "lora", "r": 13, "lora_alpha": 26}, LORA_RATES)
"""What is composed; five of them are as large as the joint one."""


@dataclass(frozen=True)
class Parts:
    """What the studies are made from.

    Attributes:
        arms: All known ones by name.
        skeleton: The base model on the meta device.
        tasks: Number of tasks.
        seeds: Seeds of the runs.
        rates: Learning rates by the name of an arm in the tables, where they are given.
        scarce_rows: Rows of the scarce task.
    """

    arms: Mapping[str, Arm]
    skeleton: nn.Module
    tasks: int
    seeds: Sequence[int]
    rates: Mapping[str, float]
    scarce_rows: int

    def arm(self, of: str, name: str | None = None, **changed: Any) -> Arm:
        """An arm with its rank, under a name of its own, with other fields."""
        known = {"grown": GROWN, LORA_OF_TASK.name: LORA_OF_TASK} | dict(self.arms)
        found = resolved(known, of, self.skeleton, self.tasks)
        return replace(found, name=name or of, fields={**found.fields, **changed})

    def rate(self, arm: Arm) -> float:
        """The learning rate: what was given, or the one in the middle of the arm's grid."""
        return self.rates.get(arm.name, sorted(arm.learning_rates)[len(arm.learning_rates) // 2])

    def staged(self, arm: Arm, kind: str, stages: Sequence[Sequence[int]], **more: Any) -> list[Job]:
        """A run a seed."""
        own = tuple(map(tuple, stages))
        return [StagedJob(arm, seed, self.rate(arm), kind, stages=own, **more) for seed in self.seeds]


def sequence(parts: Parts) -> list[Job]:
    """Tasks one after the other: what is forgotten of earlier ones."""
    one_by_one = [[task] for task in range(parts.tasks)]
    lora = parts.arm("lora")
    grown = parts.arm("grown", freeze_router=True)
    text = parts.arm("grown", "grown-text", freeze_router=True, router_level="sequence")
    trained = parts.arm("grown", "grown-trained")
    return [
        *parts.staged(lora, "sequence", one_by_one),
        *parts.staged(replace(lora, name="replay"), "sequence", one_by_one, replay=REPLAY),
        *parts.staged(grown, "sequence", one_by_one, grows=GROWTH, freezes=True),
        *parts.staged(text, "sequence", one_by_one, grows=GROWTH, freezes=True),
        *parts.staged(trained, "sequence", one_by_one, grows=GROWTH),
    ]


def added(parts: Parts) -> list[Job]:
    """The last task comes when the others have been trained together: against all trained together."""
    last = parts.tasks - 1
    two = [list(range(last)), [last]]
    together = [list(range(parts.tasks))]
    lora, grown = parts.arm("lora"), parts.arm("grown", num_experts=GROWTH * last)
    text = parts.arm("grown", "grown-text", num_experts=GROWTH * last, router_level="sequence")
    return [
        *parts.staged(lora, "added", two),
        *parts.staged(replace(lora, name="replay"), "added", two, replay=REPLAY),
        *parts.staged(grown, "added", two, grows=GROWTH, freezes=True),
        *parts.staged(text, "added", two, grows=GROWTH, freezes=True),
        *parts.staged(replace(lora, name="lora-together"), "added", together),
        *parts.staged(parts.arm("molora", "molora-together"), "added", together),
    ]


def scarce(parts: Parts) -> list[Job]:
    """Each task in turn has a few rows only, and all others have all."""
    lora, mixture = parts.arm("lora"), parts.arm("molora")
    alone = replace(lora, name="lora-alone")
    together = [list(range(parts.tasks))]
    jobs = []
    for task in range(parts.tasks):
        limits = tuple(parts.scarce_rows if other == task else 2**31 for other in range(parts.tasks))
        for arm in (lora, mixture):
            jobs += parts.staged(arm, "scarce", together, limits=limits)
        jobs += parts.staged(alone, "scarce", [[task]], limits=limits, passes=SCARCE_PASSES)
    return jobs


def composed(parts: Parts) -> list[Job]:
    """LoRAs of one task each, put together without training: against one trained on all."""
    lora, one = replace(parts.arm("lora"), name="lora-together"), parts.arm(LORA_OF_TASK.name)
    together = parts.staged(lora, "composed", [list(range(parts.tasks))])
    return [*together, *(ComposedJob(one, seed, parts.rate(one), "composed") for seed in parts.seeds)]


STUDIES: dict[str, Callable[[Parts], list[Job]]] = {
    "sequence": sequence,
    "added": added,
    "scarce": scarce,
    "composed": composed,
}


def jobs_of(studies: Sequence[str], parts: Parts, wanted: Sequence[str] | None) -> list[Job]:
    """The runs of some studies, or those of some arms of them.

    Raises:
        MoloraError: There is no such study or arm.
    """
    for study in studies:
        if study not in STUDIES:
            allowed = f"there are {', '.join(STUDIES)}."
            raise MoloraError(f"--study: no study {study!r}; {allowed}{did_you_mean(study, STUDIES)}")
    jobs = [job for study in studies for job in STUDIES[study](parts)]
    names = list(dict.fromkeys(job.arm.name for job in jobs))
    for option, given in (("--arms", wanted or ()), ("--learning_rates", parts.rates)):
        for name in given:
            if name not in names:
                allowed = f"{', '.join(studies)} has {', '.join(names)}."
                raise MoloraError(f"{option}: no arm {name!r}; {allowed}{did_you_mean(name, names)}")
    return [job for job in jobs if not wanted or job.arm.name in wanted]
