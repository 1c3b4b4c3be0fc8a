"""Numbers of rows, and what they say: means, their standard errors, and the error of a difference on the same rows.

Errors are over rows, as if they were drawn at random. They say nothing of how another seed would have come out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of the values, each counted by its weight; weights must not sum to zero."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)


def pulls(values: Sequence[float], weights: Sequence[float], slope: float = 1.0) -> list[float]:
    """How far each row pulls a function of the weighted mean away from what it is; they sum to zero.

    Args:
        values: One a row.
        weights: One a row.
        slope: Derivative of the function at the mean.
    """
    mean, whole = weighted_mean(values, weights), math.fsum(weights)
    return [slope * weight * (value - mean) / whole for value, weight in zip(values, weights, strict=True)]


def standard_error(pulled: Sequence[float]) -> float | None:
    """Standard error from the pulls of all rows; `None` for fewer than two.

    For a plain mean this is the sample standard deviation by the root of the number of rows, for one with weights the
    usual estimate for a ratio of sums.
    """
    rows = len(pulled)
    return math.sqrt(math.fsum(pull**2 for pull in pulled) * rows / (rows - 1)) if rows > 1 else None


def paired_error(own: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of a difference of two numbers from the same rows, from the pulls on each."""
    return standard_error([one - two for one, two in zip(own, other, strict=True)])


def likeliest(totals: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Index of the choice with the highest log-likelihood, or the highest one by length; the first of equals.

    Args:
        totals: Summed log-likelihood of each choice.
        lengths: What they are divided by, at least 1; `None` to leave them as they are.
    """
    scored = totals if lengths is None else [total / max(n, 1) for total, n in zip(totals, lengths, strict=True)]
    return max(range(len(scored)), key=scored.__getitem__)


def perplexity(nll: float) -> float:
    """Exp of a mean negative log-likelihood in nats; infinite where no float holds it."""
    return math.exp(nll) if nll < 700 else math.inf


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of two texts' white-space tokens, counted as bags; two empty texts agree."""
    given, wanted = Counter(answer.split()), Counter(reference.split())
    if not given or not wanted:
        return float(given == wanted)
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total())
