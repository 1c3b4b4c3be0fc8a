"""Mixtures of LoRA experts against plain LoRA at equal budget, on a folder of tasks.

Every arm sees the same stream of batches for a seed. Its learning rate is chosen on other seeds, by rows that are in
no stream; test rows are scored once, in the final runs. A run that is finished is not run again, so an interrupted
bench goes on where it was, and arms can be added later.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.bench import run
from benchmarks.quality.options import numbers, rates, words
from molora.errors import MoloraError


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--tasks", type=Path, required=True, metavar="FOLDER", help="holds train/ and test/TASK.jsonl")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="runs and results go there")
    made.add_argument("--task_names", type=words, metavar="A,B", help="default: all that are found, sorted")
    made.add_argument("--arms", type=words, metavar="A,B", help="default: all, with those of --arms_file")
    made.add_argument("--arms_file", type=Path, metavar="FILE", help="further arms, in YAML or JSON")
    made.add_argument("--reference", default="lora", metavar="ARM", help="what others are compared with")
    made.add_argument("--model", default="smollm2-135m-instruct", help="the base model")
    made.add_argument("--steps", type=int, default=80)
    made.add_argument("--batch_size", type=int, default=8)
    made.add_argument("--max_length", type=int, default=128, help="tokens; longer training rows are left out")
    made.add_argument("--validation", type=int, default=40, help="validation rows a task")
    made.add_argument("--test_rows", type=int, default=150, help="the last so many rows of each test file")
    made.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="0,1,2")
    made.add_argument("--tuning_seeds", type=numbers, default=[100, 101], metavar="100,101")
    made.add_argument(
        "--learning_rates", type=rates, default={}, metavar="ARM=RATE,...", help="these arms are not tuned"
    )
    made.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the base; default: bfloat16 on cuda")
    what = made.add_mutually_exclusive_group()
    what.add_argument("--only_tuning", action="store_true", help="choose learning rates and stop")
    what.add_argument("--initial_only", action="store_true", help="routing before training, and nothing else")
    what.add_argument("--report_only", action="store_true", help="tables of the runs there are")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if a run failed or something was wrong."""
    try:
        return run(parser().parse_args(arguments))
    except MoloraError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
