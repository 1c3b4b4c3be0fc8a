"""Whether a server answers as PyTorch does. Pure: served tokens and both sides' log-probabilities in, a verdict out.

Texts are not compared: where two tokens are nearly as probable, rounding decides, and all that follows differs. What
was served is read by PyTorch instead, which says how probable each token was to it, and how probable its own choice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

TOLERANCES = {"float32": 1e-4, "float16": 0.05, "bfloat16": 0.4}
"""Differences of a log-probability that are rounding, by precision.

In fp32 the worst seen is 3e-5, with adapters of any kind and without. A model of 30 layers in bf16 is off by up to 0.2
from itself in fp32, adapter or not, and here both sides are in bf16. fp16 has three bits more.
"""


@dataclass(frozen=True)
class Answer:
    """What a server said to one prompt.

    Attributes:
        tokens: Ids of the generated tokens, the end token included.
        logprobs: The server's log-probability of each.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True)
class Scores:
    """What PyTorch makes of the tokens of an answer.

    Attributes:
        logprobs: Its log-probability of each.
        best: The log-probability of the token it would have chosen, each time.
    """

    logprobs: Sequence[float]
    best: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """Of one answer.

    Attributes:
        tokens: How many were compared.
        same: How many of them PyTorch would have chosen too.
        worst: The largest difference of a log-probability.
        reason: What is wrong, `None` if nothing is.
    """

    tokens: int
    same: int
    worst: float
    reason: str | None = None


def judge(answer: Answer, scores: Scores, tolerance: float, wanted: int, ends: Collection[int]) -> Verdict:
    """Judge one answer.

    Args:
        answer: What was served.
        scores: What PyTorch makes of it.
        tolerance: Largest difference of a log-probability that is rounding, and how far a served token may be from
            PyTorch's own choice.
        wanted: Tokens that were asked for.
        ends: Tokens that end an answer.
    """
    tokens = len(answer.tokens)
    off = [abs(one - other) for one, other in zip(answer.logprobs, scores.logprobs, strict=False)]
    behind = [best - chosen for best, chosen in zip(scores.best, scores.logprobs, strict=False)]
    same = sum(distance <= 0 for distance in behind)
    # A NaN is no number's maximum, but has to be seen.
    worst = max(off, default=0.0) if all(value == value for value in off) else float("nan")
    reason = _form(answer, scores, wanted, ends) or _first(off, behind, tolerance, answer.tokens)
    return Verdict(tokens, same, worst, reason)


def effect(with_adapter: Sequence[Scores], without: Sequence[Scores]) -> float:
    """How much an adapter moves the log-probabilities of the same tokens, at most, in PyTorch."""
    return max(
        (
            abs(one - other)
            for adapted, plain in zip(with_adapter, without, strict=True)
            for one, other in zip(adapted.logprobs, plain.logprobs, strict=True)
        ),
        default=0.0,
    )


def _form(answer: Answer, scores: Scores, wanted: int, ends: Collection[int]) -> str | None:
    """What is wrong with an answer before its numbers are looked at."""
    tokens = len(answer.tokens)
    if not tokens:
        return "no token came back"
    if not tokens == len(answer.logprobs) == len(scores.logprobs) == len(scores.best):
        return f"{tokens} tokens came with {len(answer.logprobs)} log-probabilities"
    if tokens > wanted:
        return f"{tokens} tokens came back, and {wanted} were asked for"
    if tokens < wanted and answer.tokens[-1] not in ends:
        return f"the answer stops after {tokens} of {wanted} tokens, and not at an end token"
    return None


def _first(off: Sequence[float], behind: Sequence[float], tolerance: float, tokens: Sequence[int]) -> str | None:
    """The first position that is no rounding."""
    for place, (difference, distance) in enumerate(zip(off, behind, strict=True)):
        where = f"token {place + 1} (id {tokens[place]})"
        # Not `>`: nothing is greater than a NaN, and nothing less.
        if not difference <= tolerance:
            return f"{where}: its log-probability is off by {difference:.2g}"
        if not distance <= tolerance:
            return f"{where} is not what PyTorch would choose: it is {distance:.2g} less probable, in logarithms"
    return None
