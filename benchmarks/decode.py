"""Time greedy generation with a cache, the prompt left out: tokens per second of the random model.

    python -m benchmarks.decode
    python -m benchmarks.decode --batch 8 --new-tokens 64

Calls each model's own `generate`. The clock starts when the first new token is there, so the prompt's pass is not in
it, and stops after the last one. The ratios are of times: above 1 is slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.command import Clock, Row, compare_methods, parser
from benchmarks.harness import Measure, spread
from benchmarks.methods import Built


class FirstToken(StoppingCriteria):
    """Notes when the first new token was there; never stops anything."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if self.at is None:
            self.at = self.clock()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def decoding(built: Built, ids: Tensor, new_tokens: int, clock: Clock) -> Measure:
    """A measure of the passes after the first new token."""

    @torch.no_grad()
    def measure() -> float:
        first = FirstToken(clock)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True, "do_sample": False}
        output = built.model.generate(
            **given, **built.keywords, max_new_tokens=new_tokens, stopping_criteria=StoppingCriteriaList([first])
        )
        stopped = clock()
        made = output.shape[1] - ids.shape[1]
        if made != new_tokens or first.at is None:
            raise RuntimeError(f"generated {made} tokens, not the {new_tokens} that were asked for.")
        return stopped - first.at

    return measure


def main(given: Sequence[str] | None = None) -> int:
    """Run the comparison and print it; the exit status."""
    made = parser(str(__doc__), batch=1, length=16)
    made.add_argument("--new-tokens", type=int, default=33, help="one more than are timed; at least 2")
    arguments = made.parse_args(given)
    if arguments.new_tokens < 2:
        made.error(f"--new-tokens is {arguments.new_tokens}; it must be 2 or more, as the first one is not timed.")
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(1, arguments.vocab, shape, generator=torch.manual_seed(0))
    tokens = (arguments.new_tokens - 1) * arguments.batch

    def per_second(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
        """By the reference's median over the whole run, as the machine was not the same in every row's minute."""
        seconds = spread([value for one in rows for value in one.pairs.references]).median
        return {"tokens/s": tokens / seconds / row.spread.median}

    return compare_methods(
        "decode",
        arguments,
        lambda built, clock: decoding(built, ids, arguments.new_tokens, clock),
        [ids, ids[:, :1]],  # of the prompt's length, and the single token of a step
        training=False,
        extra=per_second,
        keep=lambda method: method.decodes,
    )


if __name__ == "__main__":
    sys.exit(main())
