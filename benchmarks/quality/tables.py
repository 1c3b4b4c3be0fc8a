"""The tables of a bench, as Markdown, and everything behind them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality import statistics as stats
from benchmarks.quality.routing import FIGURES
from benchmarks.quality.statistics import Estimate, over_seeds

ROUTING_COLUMNS = (
    "dead_experts",
    "largest_load",
    "dead_by_weight",
    "largest_weight",
    "active_experts",
    "gate_entropy",
    "router_entropy",
    "information_answers",
    "information",
)


@dataclass
class Outcome:
    """All runs of one arm that are complete.

    Attributes:
        arm: Its name.
        tuning: Validation losses of the tuning seeds, by learning rate.
        seeds: Final runs by seed, several if each is of one task.
        initial: Runs that trained nothing.
        rate: The learning rate of the final runs.
    """

    arm: str
    tuning: dict[float, list[float]] = field(default_factory=dict)
    seeds: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)
    initial: list[Mapping[str, Any]] = field(default_factory=list)
    rate: float | None = None

    def scored(self, seed: int) -> list[dict[str, list[Any]]]:
        """Its test rows."""
        return stats.put_together(self.seeds[seed])

    def of_seeds(self, name: str) -> Estimate | None:
        """A number of the runs, such as `validation_loss`; None if a run has none."""
        values: list[list[Any]] = [[run.get(name) for run in runs] for runs in self.seeds.values()]
        if not values or any(value is None for runs in values for value in runs):
            return None
        return over_seeds(statistics.fmean(runs) for runs in values)

    def figure(self, when: str, name: str) -> Estimate | None:
        """A figure of routing, mean over linears; None for arms without."""
        runs = [runs[0] for runs in self.seeds.values()] or self.initial
        found = [run[when]["mean"][name] for run in runs if run.get(when)]
        return over_seeds(found) if found else None


def tuned(results: Sequence[Mapping[str, Any]]) -> dict[float, list[float]]:
    """Validation losses by learning rate, one a seed: of a run, or the mean of those of one task each."""
    found: dict[float, list[float]] = defaultdict(list)
    rates = sorted({result["settings"]["learning_rate"] for result in results})
    for rate in rates:
        own = [result for result in results if result["settings"]["learning_rate"] == rate]
        for runs in stats.by_seed(own).values():
            found[rate].append(statistics.fmean(run["validation_loss"] for run in runs))
    return dict(found)


def compared(outcome: Outcome, reference: Outcome) -> dict[str, Any] | None:
    """An arm minus the reference, on the seeds that both have; None if there are none, or they are the same."""
    seeds = [seed for seed in outcome.seeds if seed in reference.seeds]
    if outcome.arm == reference.arm or not seeds:
        return None
    pairs = [(outcome.scored(seed), reference.scored(seed)) for seed in seeds]
    by_task = [stats.difference(own, other) for own, other in pairs]
    return {
        "seeds": seeds,
        "loss": over_seeds(statistics.fmean(tasks) for tasks in by_task),
        "tasks": [over_seeds(values) for values in zip(*by_task, strict=True)],
        "error_over_rows": statistics.fmean(stats.row_error(own, other) for own, other in pairs),
    }


def markdown(outcomes: Sequence[Outcome], tasks: Sequence[str], reference: str, heading: str) -> str:
    """All tables that there are runs for."""
    base = next((outcome for outcome in outcomes if outcome.arm == reference), Outcome(reference))
    final = [outcome for outcome in outcomes if outcome.seeds]
    parts = ["# Quality of mixtures of LoRA experts", heading]
    if final:
        parts += [_losses(final, base), note(final), _tasks(final, base, tasks), _accuracies(final, tasks)]
    if any(outcome.tuning for outcome in outcomes):
        parts.append(_tuning([outcome for outcome in outcomes if outcome.tuning]))
    if any(outcome.figure("routing_initial", "dead_experts") for outcome in outcomes):
        parts.append(_routing(outcomes))
    return "\n\n".join(parts) + "\n"


def note(outcomes: Sequence[Outcome]) -> str:
    """How far the errors can be trusted."""
    counts = {len(outcome.seeds) for outcome in outcomes}
    fewest = min(counts)
    seeds = f"{fewest} seed{'s' * (fewest > 1)}" if len(counts) == 1 else f"{fewest} to {max(counts)} seeds"
    if fewest < 2:
        return f"With {seeds} there is no error over seeds: nothing here says that a difference would come again."
    unsure = 1 / math.sqrt(2 * (fewest - 1))
    return (
        f"± is the standard error over {seeds}, itself known to about {unsure:.0%}. A difference below two or three "
        'of them is not shown. "Over rows" is the noise of the test rows alone, which says nothing about other seeds.'
    )


def _losses(outcomes: Sequence[Outcome], base: Outcome) -> str:
    columns = ["arm", "learning rate", "trained parameters", "of routers", "test loss", f"minus {base.arm}",
               "over rows", "validation loss", "online loss", "seconds a run"]  # fmt: skip
    rows = []
    for outcome in outcomes:
        first = next(iter(outcome.seeds.values()))
        against = compared(outcome, base)
        counts = [sum(run["parameters"][kind] for run in first) for kind in ("all", "router")]
        rows.append([
            outcome.arm,
            f"{outcome.rate:g}",
            f"{counts[0] / len(first):,.0f}" + f" x {len(first)}" * (len(first) > 1),
            f"{counts[1]:,}",
            over_seeds(stats.test_loss(outcome.scored(seed)) for seed in outcome.seeds).text(),
            against["loss"].text(sign=True) if against else "-",
            f"{against['error_over_rows']:.3f}" if against else "-",
            _text(outcome.of_seeds("validation_loss")),
            _text(outcome.of_seeds("online_loss")),
            f"{statistics.fmean(run['seconds'] for runs in outcome.seeds.values() for run in runs):.0f}",
        ])  # fmt: skip
    return f"## Test loss\n\n{table(columns, rows)}"


def _tasks(outcomes: Sequence[Outcome], base: Outcome, tasks: Sequence[str]) -> str:
    rows = []
    for outcome in outcomes:
        scored = [outcome.scored(seed) for seed in outcome.seeds]
        own = [over_seeds(stats.task_loss(run[at]) for run in scored).text() for at in range(len(tasks))]
        rows.append([outcome.arm, *own])
        if against := compared(outcome, base):
            rows.append([f"{outcome.arm} minus {base.arm}", *(one.text(sign=True) for one in against["tasks"])])
    return f"## Test loss by task\n\n{table(['arm', *tasks], rows)}"


def _accuracies(outcomes: Sequence[Outcome], tasks: Sequence[str]) -> str:
    rows = []
    for outcome in outcomes:
        scored = [outcome.scored(seed) for seed in outcome.seeds]
        cells = []
        for at in range(len(tasks)):
            chosen = [stats.accuracy(run[at]) for run in scored]
            known = [value for value in chosen if value is not None]
            text = f"{over_seeds(known).text()} / " if known else ""
            cells.append(text + over_seeds(stats.exact(run[at]) for run in scored).text())
        rows.append([outcome.arm, *cells])
    about = "Choice accuracy, where there are choices / exact match, teacher-forced. Reported, not tested."
    return f"## Accuracy\n\n{about}\n\n{table(['arm', *tasks], rows)}"


def _tuning(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        best, at_edge = stats.best_rate(outcome.tuning)
        for rate, losses in outcome.tuning.items():
            mark = ("chosen, at the edge of its grid" if at_edge else "chosen") if rate == best else ""
            rows.append([outcome.arm, f"{rate:g}", over_seeds(losses).text(4), mark])
    return (
        f"## Learning rates\n\nOn the tuning seeds.\n\n{table(['arm', 'learning rate', 'validation loss', ''], rows)}"
    )


def _routing(outcomes: Sequence[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        cells = []
        for name in ROUTING_COLUMNS:
            times = [outcome.figure(when, name) for when in ("routing_initial", "routing_final")]
            cells.append(" → ".join(f"{value.mean:.3f}" for value in times if value is not None))
        if any(cells):
            rows.append([outcome.arm, *cells])
    meaning = "\n".join(f"- `{name}`: {text}" for name, text in FIGURES.items())
    about = "At initialisation → at the end, on validation rows; means over linears and seeds."
    return f"## Routing\n\n{about}\n\n{table(['arm', *ROUTING_COLUMNS], rows)}\n\n{meaning}"


def _text(value: Estimate | None) -> str:
    return "-" if value is None else value.text()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
