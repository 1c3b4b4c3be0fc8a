"""What the scripts of this folder share: references, how an answer is compared with one, and what is printed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXACT = 1e-4
"""Difference of a log-probability that is rounding, in fp32."""

DIFFERENT = 1e-3
"""From here on it is none."""

Answer = dict[str, Any]
"""`tokens`, their ids with the end token, and `logprobs`, one for each."""


@dataclass(frozen=True)
class Reference:
    """What transformers, PEFT and molora answer: `reference.json` of a folder that `prepare.py` wrote.

    Attributes:
        folder: That folder.
        base: Folder of the base model.
        prompts: Token ids of every prompt.
        new_tokens: Longest answer.
        runs: Answers to all prompts, by adapter; those of the base model alone are called `base`.
        controls: Answers of adapters that route wrongly, by `ADAPTER: what is wrong`.
    """

    folder: Path
    base: str
    prompts: list[list[int]]
    new_tokens: int
    runs: dict[str, list[Answer]]
    controls: dict[str, list[Answer]]

    @property
    def adapters(self) -> dict[str, str]:
        """Folders of the adapters by name, in a fixed order."""
        return {name: str(self.folder / "adapters" / name) for name in self.runs if name != "base"}


def read_reference(folder: Path) -> Reference:
    return Reference(folder=folder, **json.loads((folder / "reference.json").read_text()))


@dataclass(frozen=True)
class Agreement:
    """Of answers with their references.

    Attributes:
        identical: How many have the same tokens.
        of: How many there are.
        worst: Largest difference of a log-probability, on the tokens that both have in common from the start.
    """

    identical: int
    of: int
    worst: float

    @property
    def is_exact(self) -> bool:
        """Whether answers are those of the reference; a NaN is no answer."""
        return self.of > 0 and self.identical == self.of and self.worst <= EXACT

    @property
    def is_different(self) -> bool:
        """Whether they come from something else."""
        return self.identical < self.of or self.worst > DIFFERENT

    def __str__(self) -> str:
        return f"{self.identical}/{self.of} texts identical, worst logprob difference {self.worst:.1e}"


def compare(answers: Sequence[Answer], references: Sequence[Answer], first: int | None = None) -> Agreement:
    """Compare answers with what they should be.

    Args:
        answers: What was served.
        references: What should have been.
        first: Only that many tokens were asked for; `None` for all.
    """
    identical, worst = 0, 0.0
    for answer, reference in zip(answers, references, strict=True):
        tokens, expected = answer["tokens"], reference["tokens"][:first]
        identical += tokens == expected
        pairs = zip(tokens, expected, answer["logprobs"], reference["logprobs"], strict=False)
        for token, wanted, found, right in pairs:
            if token != wanted:
                break
            difference = abs(found - right)
            worst = difference if not difference <= worst else worst  # not `max`, which would lose a NaN
    return Agreement(identical, len(answers), worst)


class Report:
    """Prints what passed and what did not.

    Args:
        title: What every line begins with.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.passed = self.failed = 0

    def line(self, good: bool, what: str) -> None:
        self.passed += bool(good)
        self.failed += not good
        print(f"{'PASS' if good else 'FAIL'} {self.title}: {what}", flush=True)  # noqa: T201

    def end(self) -> int:
        """The exit code: 0 if something was checked and nothing failed."""
        print(f"{self.title}: {self.passed} passed, {self.failed} failed", flush=True)  # noqa: T201
        return int(self.failed > 0 or self.passed == 0)
