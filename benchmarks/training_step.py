"""Time a training step (forward, backward, AdamW) of each method against PEFT's LoRA of equal active rank.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --only molora PEFT --pairs 5 --json steps.json

A random Llama; all seven linears of a layer are adapted; no dropout. The base row has no optimizer, only a forward
pass and the gradient of its input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch.nn import functional

from benchmarks.command import Clock, compare_methods, parser
from benchmarks.harness import Measure, timed
from benchmarks.methods import Built


def main(given: Sequence[str] | None = None) -> int:
    """Run the comparison and print it; the exit status."""
    arguments = parser(str(__doc__), batch=1, length=512).parse_args(given)
    ids = torch.randint(1, arguments.vocab, (arguments.batch, arguments.length), generator=torch.manual_seed(0))

    def step_of(built: Built, clock: Clock) -> Measure:
        optimizer = torch.optim.AdamW(built.trained, lr=1e-5) if built.trained else None

        def step() -> None:
            logits = built(input_ids=ids, use_cache=False).logits
            functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return timed(step, clock)

    return compare_methods("training_step", arguments, step_of, [ids], training=True)


if __name__ == "__main__":
    sys.exit(main())
