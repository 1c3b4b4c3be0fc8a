"""The tables of the continual studies, and the figures behind them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality.statistics import Estimate, over_seeds
from benchmarks.quality.tables import table

Run = Mapping[str, Any]
Figures = dict[str, float]

REFERENCE = "lora"


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their arm, in the order they come; each in the order of its seeds."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["settings"]["arm"], []).append(run)
    return {arm: sorted(own, key=lambda run: run["settings"]["seed"]) for arm, own in found.items()}


def forgetting(run: Run) -> Figures:
    """What a run of stages forgot: losses at the end minus those right after the stage that taught the task.

    `first` is of the first stage's tasks, `mean` of all tasks but the last stage's. `final` is the mean loss of all
    tasks at the end, `learned` that of each task right after its own stage, `leaked` the mean share of a task's gate
    weight that experts have which were added after its stage.
    """
    names = run["settings"]["tasks"]
    stages = [[names.index(task) for task in tasks] for tasks in run["settings"]["stages"]]
    losses = [stage["losses"] for stage in run["stages"]]
    last = losses[-1]
    after = [{task: last[task] - losses[at][task] for task in tasks} for at, tasks in enumerate(stages)]
    earlier = [value for own in after[:-1] for value in own.values()]
    figures = {
        "final": statistics.fmean(loss for loss in last if loss is not None),
        "learned": statistics.fmean(losses[at][task] for at, tasks in enumerate(stages) for task in tasks),
    }
    if earlier:
        figures |= {"first": statistics.fmean(after[0].values()), "mean": statistics.fmean(earlier)}
    grows = run["settings"]["grows"]
    if run["shares"] and grows and earlier:
        start = len(run["shares"][0]) - grows * (len(stages) - 1)
        later = [
            sum(run["shares"][task][start + grows * at :]) for at, tasks in enumerate(stages[:-1]) for task in tasks
        ]
        figures["leaked"] = statistics.fmean(later)
    return figures


def ratios(own: Sequence[Figures], other: Sequence[Figures], name: str) -> tuple[float | None, Estimate | None]:
    """A figure over another arm's on the same seeds: the ratio of means, and the mean of each seed's ratio.

    None where the other arm forgets nothing, so that there is nothing to compare with.
    """
    pairs = [(one[name], two[name]) for one, two in zip(own, other, strict=True) if name in one and name in two]
    if not pairs:
        return None, None
    mine, theirs = (statistics.fmean(values) for values in zip(*pairs, strict=True))
    each = over_seeds(one / two for one, two in pairs) if all(two > 0 for _, two in pairs) else None
    return (mine / theirs if theirs > 0 else None), each


def _paired(own: Sequence[Run], other: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs of the same seed."""
    known = {run["settings"]["seed"]: run for run in other}
    return [(run, known[run["settings"]["seed"]]) for run in own if run["settings"]["seed"] in known]


def sequence_summary(runs: Sequence[Run]) -> dict[str, Any]:
    """For each arm its figures over seeds, those against `lora`, and the mean loss of each task after each stage."""
    arms = by_arm(runs)
    found: dict[str, Any] = {}
    for arm, own in arms.items():
        figures = [forgetting(run) for run in own]
        entry: dict[str, Any] = {name: over_seeds(one[name] for one in figures) for name in figures[0]}
        pairs = _paired(own, arms.get(REFERENCE, []))
        if arm != REFERENCE and pairs:
            mine, theirs = zip(*((forgetting(one), forgetting(two)) for one, two in pairs), strict=True)
            entry["final_minus_lora"] = over_seeds(
                one["final"] - two["final"] for one, two in zip(mine, theirs, strict=True)
            )
            for name in ("first", "mean"):
                of_means, each = ratios(mine, theirs, name)
                entry[f"{name}_over_lora"] = {"of_means": of_means, "by_seed": each}
        entry["matrix"] = [
            [_mean(run["stages"][at]["losses"][task] for run in own) for task in range(len(own[0]["before"]))]
            for at in range(len(own[0]["stages"]))
        ]
        found[arm] = entry
    return found


def _mean(values: Any) -> float | None:
    own = list(values)
    return None if None in own else statistics.fmean(own)


def sequence_text(runs: Sequence[Run], title: str) -> str:
    """The tables of a study whose tasks come in stages."""
    columns = ["arm", "learning rate", "parameters", "loss after own stage", "loss at the end", "minus lora",
               "forgotten of the first", "over lora", "by seed", "forgotten of all", "over lora", "by seed",
               "weight at later experts"]  # fmt: skip
    rows, matrices = [], []
    arms = by_arm(runs)
    for arm, entry in sequence_summary(runs).items():
        cells = [arm, f"{arms[arm][0]['settings']['learning_rate']:g}", f"{arms[arm][0]['parameters']['all']:,}"]
        cells += [_text(entry.get(name)) for name in ("learned", "final")]
        cells.append(_text(entry.get("final_minus_lora"), sign=True))
        for name in ("first", "mean"):
            ratio = entry.get(f"{name}_over_lora", {"of_means": None, "by_seed": None})
            cells.append(_text(entry.get(name), sign=True))
            cells.append("-" if ratio["of_means"] is None else f"{ratio['of_means']:.2f}")
            cells.append("-" if ratio["by_seed"] is None else ratio["by_seed"].text(2))
        rows.append([*cells, _text(entry.get("leaked"))])
        matrices.append(_matrix(arm, arms[arm][0], entry["matrix"]))
    return "\n\n".join([title, _seeds(runs), table(columns, rows), *matrices])


def _matrix(arm: str, run: Run, losses: Sequence[Sequence[float | None]]) -> str:
    settings = run["settings"]
    lines = [["before", *(f"{loss:.3f}" for loss in run["before"])]]
    for tasks, own in zip(settings["stages"], losses, strict=True):
        lines.append([", ".join(tasks), *("-" if loss is None else f"{loss:.3f}" for loss in own)])
    return f"`{arm}`, mean test loss after each stage:\n\n{table(['after', *settings['tasks']], lines)}"


def _text(value: Estimate | None, sign: bool = False) -> str:
    return "-" if value is None else value.text(sign=sign)


def _seeds(runs: Sequence[Run]) -> str:
    seeds = sorted({run["settings"]["seed"] for run in runs})
    note = "± is the standard error over them." if len(seeds) > 1 else "There is no error over seeds."
    return f"Seeds {', '.join(map(str, seeds))}. {note}"


def scarce_summary(runs: Sequence[Run]) -> dict[str, dict[str, Estimate]]:
    """For each arm the loss of each task where it was the scarce one, and their mean over tasks."""
    found: dict[str, dict[str, Estimate]] = {}
    for arm, own in by_arm(runs).items():
        values: dict[str, dict[int, float]] = {}
        for run in own:
            settings = run["settings"]
            task = settings["limits"].index(min(settings["limits"]))
            values.setdefault(settings["tasks"][task], {})[settings["seed"]] = run["stages"][-1]["losses"][task]
        seeds = sorted(set.intersection(*(set(losses) for losses in values.values())))
        found[arm] = {task: over_seeds(losses[seed] for seed in sorted(losses)) for task, losses in values.items()}
        if seeds:
            found[arm]["mean"] = over_seeds(
                statistics.fmean(losses[seed] for losses in values.values()) for seed in seeds
            )
    return found


def scarce_text(runs: Sequence[Run]) -> str:
    """The table of scarce tasks."""
    limits = runs[0]["settings"]["limits"]
    title = (
        f"## Scarce\n\nEach task in turn has {min(limits)} rows, all others have all. Test loss of the scarce task."
    )
    return "\n\n".join([title, _seeds(runs), _tasks_table(scarce_summary(runs))])


def composed_summary(runs: Sequence[Run]) -> dict[str, dict[str, Estimate]]:
    """For each way of having all tasks in one model the loss of each, and their mean over tasks."""
    losses: dict[str, list[Sequence[float]]] = {}
    names = runs[0]["settings"]["tasks"]
    for run in runs:
        if "ways" in run:
            of_run = {"each alone": run["alone"], **run["ways"]}
        else:
            of_run = {run["settings"]["arm"]: run["stages"][-1]["losses"]}
        for way, own in of_run.items():
            losses.setdefault(way, []).append(own)
    return {
        way: {task: over_seeds(own) for task, own in zip(names, zip(*values, strict=True), strict=True)}
        | {"mean": over_seeds(map(statistics.fmean, values))}
        for way, values in losses.items()
    }


def composed_text(runs: Sequence[Run]) -> str:
    """The table of composed adapters."""
    title = "## Composed\n\nA LoRA for each task, put together without training, and one that was trained on all."
    return "\n\n".join([title, _seeds(runs), _tasks_table(composed_summary(runs))])


def _tasks_table(found: Mapping[str, Mapping[str, Estimate]]) -> str:
    columns = list(dict.fromkeys(itertools.chain(*found.values())))
    return table(["", *columns], [[name, *(_text(own.get(task)) for task in columns)] for name, own in found.items()])


_ARMS = """- `lora`: trained on and on. In all arms every stage has an optimizer and a schedule of its own.
- `replay`: the same, a quarter of every later batch drawn from all rows of earlier tasks. The steps are as many, so a
  quarter of the new rows is not seen.
- `grown`: new experts for every stage. Those that are there are frozen, and so are the routers once calibrated. Inputs
  of routers are normalised by the first stage's rows. Earlier tasks change only where new experts win their tokens.
- `grown-text`: the same, the whole prompt decides.
- `grown-trained`: as `grown`, routers not frozen."""

TITLES = {
    "sequence": (
        "## Sequence\n\nTasks one after the other. Forgotten: test loss at the end minus that right after the task's "
        f"own stage; `over lora` is the ratio of means over seeds.\n\n{_ARMS}"
    ),
    "added": (
        "## Added later\n\nThe last task comes when the others have been trained together; arms as in a sequence, but "
        "routers of grown mixtures are trained in the first stage. `-together`: all tasks from the beginning."
    ),
}

TEXTS: dict[str, Callable[[Sequence[Run]], str]] = {
    "sequence": lambda runs: sequence_text(runs, TITLES["sequence"]),
    "added": lambda runs: sequence_text(runs, TITLES["added"]),
    "scarce": scarce_text,
    "composed": composed_text,
}
SUMMARIES: dict[str, Callable[[Sequence[Run]], Any]] = {
    "sequence": sequence_summary,
    "added": sequence_summary,
    "scarce": scarce_summary,
    "composed": composed_summary,
}
