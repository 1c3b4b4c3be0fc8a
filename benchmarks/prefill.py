"""Time a prompt's forward pass, which fills the cache and gives the last token's logits.

python -m benchmarks.prefill
python -m benchmarks.prefill --length 2048 --only molora PEFT
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from benchmarks.command import Clock, compare_methods, parser
from benchmarks.harness import Measure, timed
from benchmarks.methods import Built


def main(given: Sequence[str] | None = None) -> int:
    """Run the comparison and print it; the exit status."""
    arguments = parser(str(__doc__), batch=1, length=512).parse_args(given)
    ids = torch.randint(1, arguments.vocab, (arguments.batch, arguments.length), generator=torch.manual_seed(0))

    def prompt_of(built: Built, clock: Clock) -> Measure:
        @torch.no_grad()
        def prompt() -> None:
            built(input_ids=ids, use_cache=built.cached, logits_to_keep=1)

        return timed(prompt, clock)

    return compare_methods("prefill", arguments, prompt_of, [ids], training=False)


if __name__ == "__main__":
    sys.exit(main())
