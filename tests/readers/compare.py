"""Compare what readers answered: `python compare.py PEFT.json OTHER.json...`; exits with 1 if they disagree.

The first file is the reference. In every other one each run that both have must give the same tokens, or part where
the reference itself was undecided, and the same probabilities up to there. A merged model must agree with the adapter
beside its base, and the adapter must change the answers: a reader that drops it silently is the failure most feared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BOUND = 2e-3
"""Allowed difference of a logarithm of a probability, in fp32. llama.cpp differs from PyTorch by 3e-4 without any
adapter, vLLM by less."""

Answers = list[dict[str, Any]]


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two answers share from the start."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def against(reference: Answers, answers: Answers) -> dict[str, Any]:
    """Identical texts, and the worst difference of logprobs on the tokens that both share."""
    shared = [common(a["tokens"], b["tokens"]) for a, b in zip(reference, answers, strict=True)]
    worst = max(
        (
            abs(x - y)
            for a, b, n in zip(reference, answers, shared, strict=True)
            for x, y in zip(a["logprobs"][:n], b["logprobs"][:n], strict=True)
        ),
        default=float("nan"),
    )
    parted = []
    for a, b, n in zip(reference, answers, shared, strict=True):
        if a["tokens"] != b["tokens"]:
            both = n < len(a["tokens"]) and n < len(b["tokens"])
            parted.append(abs(a["logprobs"][n] - b["logprobs"][n]) if both else float("inf"))
    return {"identical": len(answers) - len(parted), "of": len(answers), "worst": worst, "parted": parted}


def agree(found: dict[str, Any]) -> bool:
    """Whether answers are the same but for rounding; where two tokens tie, either may come first."""
    return found["worst"] <= BOUND and all(gap <= BOUND for gap in found["parted"])


def report(files: list[Path]) -> bool:
    """Print a line for each comparison; whether all are as they must be."""
    read = [json.loads(file.read_text()) for file in files]
    first = read[0]["runs"]
    good = True

    def line(what: str, found: dict[str, Any], fine: bool) -> None:
        nonlocal good
        good = good and fine
        counts = f"{found['identical']}/{found['of']} texts identical"
        print(f"{'ok  ' if fine else 'FAIL'} {what}: {counts}, worst logprob difference {found['worst']:.1e}")  # noqa: T201

    for entry in read:
        name, runs = entry["reader"], entry["runs"]
        changed = against(runs["base"], runs["lora"])
        line(
            f"{name}, base to lora, must differ", changed, not agree(changed) and changed["identical"] < changed["of"]
        )
        if "merged" in runs:
            found = against(runs["lora"], runs["merged"])
            line(f"{name}, lora to merged", found, agree(found))
        if entry is not read[0]:
            for run in runs.keys() & first.keys():
                found = against(first[run], runs[run])
                line(f"{read[0]['reader']} to {name}, {run}", found, agree(found))
    return good


if __name__ == "__main__":
    sys.exit(0 if report([Path(name) for name in sys.argv[1:]]) else 1)
