"""Paired timing on a machine that other work shares, and what may be concluded from it.

Two runs a minute apart are not comparable where other jobs come and go. So every run of a candidate has a run of the
reference directly before it and one directly after it, and only the ratio to their mean is kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Measure = Callable[[], float]
"""Runs once what is measured and returns its seconds."""

INDISTINCT = "not distinguishable"


@dataclass(frozen=True)
class Pairs:
    """Seconds of a candidate, and of the reference before the first run, between runs and after the last."""

    seconds: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Each run divided by the mean of the two references beside it."""
        beside = zip(self.references, self.references[1:], strict=False)
        return [own / ((before + after) / 2) for own, (before, after) in zip(self.seconds, beside, strict=True)]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value; quartiles interpolate between values."""
    if not values:
        raise ValueError("there is nothing to take a median of; run at least one pair.")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def noise_of(same: Iterable[Spread]) -> float:
    """How far from 1 the ratio of two equal things was seen, from the A/A rows of a table.

    The worst quartile of all A/A rows, since one of them may have fallen into a quiet minute.

    Raises:
        ValueError: Without an A/A row, no difference can be told from noise.
    """
    distances = [abs(value - 1) for row in same for value in (row.low, row.median, row.high)]
    if not distances:
        raise ValueError("a table needs an A/A row: the reference, built a second time.")
    return max(distances)


def verdict(row: Spread, noise: float) -> str:
    """What a ratio allows to say: a difference smaller than the noise, or within the own quartiles, is none."""
    if abs(row.median - 1) <= noise or row.low <= 1 <= row.high:
        return INDISTINCT
    return "slower" if row.median > 1 else "faster"


def clock_for(threads: int) -> tuple[Callable[[], float], str]:
    """The clock to use and its name: CPU time of the thread if there is but one, else the time on the wall.

    The CPU time does not count the time that other jobs held the core.
    """
    return (time.thread_time, "thread CPU time") if threads == 1 else (time.perf_counter, "wall clock")


def timed(run: Callable[[], object], clock: Callable[[], float]) -> Measure:
    """A measure of a whole call."""

    def measure() -> float:
        started = clock()
        run()
        return clock() - started

    return measure


def compare(candidate: Measure, reference: Measure, pairs: int, warm: int = 1) -> Pairs:
    """Run reference and candidate in turn.

    Args:
        candidate: What is compared.
        reference: What it is compared with.
        pairs: Runs of the candidate.
        warm: Runs of both before, which do not count.
    """
    for _ in range(warm):
        candidate()
        reference()
    seconds, references = [], [reference()]
    for _ in range(pairs):
        seconds.append(candidate())
        references.append(reference())
    return Pairs(tuple(seconds), tuple(references))
