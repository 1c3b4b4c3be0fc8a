"""The order of it all: data, arms, tuning, final runs, tables."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import report
from benchmarks.quality import statistics as stats
from benchmarks.quality.arms import Arm, chosen_arms, read_arms, resolved
from benchmarks.quality.data import found_tasks, load_rows
from benchmarks.quality.jobs import Bench, Job, read_result
from benchmarks.quality.plot import draw
from benchmarks.quality.pool import Pool, Work
from benchmarks.quality.tables import Outcome, compared, markdown, note, tuned
from molora.base import ensure_pad_token, resolve_base
from molora.errors import MoloraError, did_you_mean
from molora.writing import new_file

RESULTS = ("json", "md", "png")


@dataclass
class Session:
    """A call of the command.

    Attributes:
        given: Its arguments.
        work: What every run needs.
        arms: What is compared, resolved.
        pool: Does the runs.
        failed: Runs that went wrong, and why.
        missing: Runs that are not there when only a report is asked for.
    """

    given: argparse.Namespace
    work: Work
    arms: list[Arm]
    pool: Pool
    failed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def results(self, jobs: Sequence[Job]) -> list[list[dict[str, Any]]]:
        """Do what has not been done yet, and give the results there are of each arm, in order."""
        files = {job.file(self.work.runs, self.work.bench): job for job in jobs}
        todo = [(file, job) for file, job in files.items() if not file.exists()]
        # Seed by seed, so that what an interruption leaves can be compared; within a seed the longest first.
        order = list(dict.fromkeys(job.seed for job in jobs))
        todo.sort(key=lambda pair: (order.index(pair[1].seed), -pair[1].cost(self.work.bench)))
        if self.given.report_only:
            self.missing += [file.stem for file, _ in todo]
        elif todo:
            print(f"{len(todo)} runs of {len(jobs)}, {self.given.workers} at a time", file=sys.stderr, flush=True)
            self.pool.run([job for _, job in todo], self._done(len(todo)))
        there = [(job, read_result(file)) for file, job in files.items() if file.exists()]
        return [[result for job, result in there if job.arm is arm] for arm in self.arms]

    def _done(self, total: int) -> Callable[[Job, float, str], None]:
        started, count = time.perf_counter(), 0

        def done(job: Job, seconds: float, error: str) -> None:
            nonlocal count
            count += 1
            name = job.file(self.work.runs, self.work.bench).stem
            if error:
                self.failed[name] = error
            end = f"FAILED: {error.strip().splitlines()[-1]}" if error else f"{seconds:.0f} s"
            minutes = (time.perf_counter() - started) / 60
            print(f"[{count}/{total}, {minutes:.1f} min] {name}: {end}", file=sys.stderr, flush=True)

        return done


def run(given: argparse.Namespace) -> int:
    """Run the bench and write its results.

    Returns:
        The exit status.

    Raises:
        MoloraError: Something that was given cannot be used.
    """
    _check(given)
    session = _prepare(given)
    try:
        outcomes = _initial(session) if given.initial_only else _outcomes(session)
    finally:
        session.pool.close()
    write(session, outcomes)
    for name in session.missing:
        print(f"not run yet: {name}")
    for name, error in session.failed.items():
        print(f"\nFAILED {name}:\n{error}", file=sys.stderr)
    return int(bool(session.failed))


def _check(given: argparse.Namespace) -> None:
    for name in ("steps", "batch_size", "max_length", "validation", "test_rows", "workers"):
        if getattr(given, name) < 1:
            raise MoloraError(f"--{name}: got {getattr(given, name)}; must be at least 1.")
    both = sorted(set(given.seeds) & set(given.tuning_seeds))
    if both:
        raise MoloraError(f"--tuning_seeds: {both} are --seeds too; learning rates are chosen on other seeds.")
    if not given.seeds or not given.tuning_seeds:
        raise MoloraError("--seeds and --tuning_seeds: give at least one each.")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise MoloraError("--device cuda: torch finds no CUDA device; use --device cpu.")


def _prepare(given: argparse.Namespace) -> Session:
    """Read everything, so that mistakes show before the first run."""
    known = read_arms(given.arms_file)
    arms = chosen_arms(known, given.arms)
    for option, names in (("--learning_rates", given.learning_rates), ("--reference", [given.reference])):
        for name in names:
            if name not in known:
                allowed = f"there are {', '.join(known)}."
                raise MoloraError(f"{option}: no arm {name!r}; {allowed}{did_you_mean(name, known)}")
    path = resolve_base(given.model)
    config = AutoConfig.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ensure_pad_token(tokenizer, int(config.get_text_config().vocab_size))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = found_tasks(given.tasks, given.task_names)
    per_task = given.steps * given.batch_size // len(names)
    if not per_task:
        raise MoloraError(f"{given.steps} steps of {given.batch_size} rows are too few for {len(names)} tasks.")
    rows = load_rows(
        given.tasks, names, tokenizer, per_task=per_task, max_length=given.max_length,
        validation=given.validation, test_rows=given.test_rows,
    )  # fmt: skip
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    bench = Bench(
        given.model, dtype, given.device, rows.names, rows.digest, given.steps, given.batch_size, given.max_length,
        given.validation, given.test_rows,
    )  # fmt: skip
    work = Work(bench, rows, given.out / "runs", int(tokenizer.pad_token_id))
    ready = [resolved(known, arm.name, skeleton, len(names)) for arm in arms]
    return Session(given, work, ready, Pool(work, given.workers))


def _jobs(session: Session, arm: Arm, kind: str, seeds: Sequence[int], rates: Sequence[float]) -> list[Job]:
    tasks = range(len(session.work.bench.tasks)) if arm.one_task else [None]
    return [Job(arm, seed, rate, kind, task) for rate in rates for seed in seeds for task in tasks]


def _initial(session: Session) -> list[Outcome]:
    """Routing before the first step."""
    routed = [arm for arm in session.arms if not arm.one_task]
    jobs = [job for arm in routed for job in _jobs(session, arm, "initial", session.given.seeds, [0.0])]
    found = session.results(jobs)
    return [Outcome(arm.name, initial=list(own)) for arm, own in zip(session.arms, found, strict=True)]


def _outcomes(session: Session) -> list[Outcome]:
    given, fixed = session.given, session.given.learning_rates
    tuning = [
        job
        for arm in session.arms
        if arm.name not in fixed and len(arm.learning_rates) > 1
        for job in _jobs(session, arm, "tuning", given.tuning_seeds, arm.learning_rates)
    ]
    outcomes = [Outcome(arm.name) for arm in session.arms]
    final: list[Job] = []
    for arm, outcome, own in zip(session.arms, outcomes, session.results(tuning), strict=True):
        # A grid with a hole would favour what is left; the failed run is reported, and can be run again.
        outcome.tuning = tuned(own) if len(own) == sum(job.arm is arm for job in tuning) else {}
        if arm.name in fixed:
            outcome.rate = fixed[arm.name]
        elif len(arm.learning_rates) == 1:
            outcome.rate = arm.learning_rates[0]
        elif outcome.tuning:
            outcome.rate = stats.best_rate(outcome.tuning)[0]
        if outcome.rate is not None and not given.only_tuning:
            final += _jobs(session, arm, "final", given.seeds, [outcome.rate])
    for arm, outcome, results in zip(session.arms, outcomes, session.results(final), strict=True):
        seeds = stats.by_seed(results)
        whole = len(session.work.bench.tasks) if arm.one_task else 1
        outcome.seeds = {seed: runs for seed, runs in seeds.items() if len(runs) == whole}
    return outcomes


def write(session: Session, outcomes: Sequence[Outcome]) -> None:
    """Write tables, plot and JSON under a name that is not taken, and print the tables."""
    given, bench = session.given, session.work.bench
    stem = _free_name(given.out)
    reference = next((outcome for outcome in outcomes if outcome.arm == given.reference), Outcome(given.reference))
    text = markdown(outcomes, bench.tasks, given.reference, _heading(session))
    content = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(given),
        "versions": report.versions(),
        "settings": vars(bench)
        | {"seeds": given.seeds, "tuning_seeds": given.tuning_seeds, "reference": given.reference},
        "arms": [_arm_json(arm, outcome, reference) for arm, outcome in zip(session.arms, outcomes, strict=True)],
        "failed": session.failed,
        "missing": session.missing,
    }
    with new_file(given.out / f"{stem}.json") as partial:
        partial.write_text(json.dumps(content, indent=1, default=vars) + "\n", encoding="utf-8")
    with new_file(given.out / f"{stem}.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)
    why = _plot(given.out / f"{stem}.png", outcomes, given.reference)
    print(f"Written: {given.out / stem}.json and .md" + (f"; no plot: {why}." if why else " and .png."))


def _plot(path: Path, outcomes: Sequence[Outcome], reference: str) -> str:
    drawn = path.with_name(f".{path.name}-drawing")
    try:
        why = draw(drawn, outcomes, reference)
        if not why:
            with new_file(path) as partial:
                partial.write_bytes(drawn.read_bytes())
        return why
    finally:
        drawn.unlink(missing_ok=True)


def _free_name(folder: Path) -> str:
    """The first of `results`, `results-2`, ... that no file has: earlier results stay."""
    number, stem = 1, "results"
    while any((folder / f"{stem}.{ending}").exists() for ending in RESULTS):
        number += 1
        stem = f"results-{number}"
    return stem


def _machine(given: argparse.Namespace) -> dict[str, Any]:
    gpu = {"gpu": torch.cuda.get_device_name()} if given.device == "cuda" else {}
    return report.machine(1) | gpu | {"workers": given.workers}


def _heading(session: Session) -> str:
    bench, versions = session.work.bench, report.versions()
    where = _machine(session.given)
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{bench.model} in {bench.dtype}; {len(bench.tasks)} tasks ({', '.join(bench.tasks)}); {bench.steps} steps of "
        f"{bench.batch_size} rows of at most {bench.max_length} tokens; {bench.test_rows} test rows and "
        f"{bench.validation} validation rows a task; seeds {_listed(session.given.seeds)}, learning rates chosen on "
        f"seeds {_listed(session.given.tuning_seeds)}. {where.get('gpu', where['cpu'])}; {named}."
    )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _arm_json(arm: Arm, outcome: Outcome, reference: Outcome) -> dict[str, Any]:
    """Everything about an arm: its settings, its estimates and its runs."""
    scored = [outcome.scored(seed) for seed in outcome.seeds]
    return {
        "arm": arm,
        "learning_rate": outcome.rate,
        "tuning": outcome.tuning,
        "test_loss": stats.over_seeds(map(stats.test_loss, scored)) if scored else None,
        f"minus_{reference.arm}": compared(outcome, reference),
        "note": note([outcome]) if scored else None,
        "initial": outcome.initial,
        "runs": [run for runs in outcome.seeds.values() for run in runs],
    }
