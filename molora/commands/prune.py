"""`molora prune`: make a trained mixture smaller, and show what that costs."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console

from molora.evaluation import score_table
from molora.slim.job import slim_adapter
from molora.slim.report import SLIM_FILE, slim_table, summary


def run(directory: str, out: str, **options: Any) -> int:
    """Write a smaller adapter to a new folder, and print what was removed and what it costs.

    Args:
        directory: Folder of the adapter.
        out: New folder.
        **options: Fields of `molora.slim.job.SlimOptions`: `below`, `drop`, `keep_energy`, `rank` or `merge_to`, and
            `calibrate`, `rows`, `seed`, `base_model`, `evaluate`.

    Raises:
        ConfigError: If the options contradict each other, or this cannot be done to the adapter.
        DataError: If calibration rows cannot be read.
        WriteError: If `out` cannot be written.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    result = slim_adapter(directory, out, **options)
    console = Console()
    table = slim_table(result.slim.modules)
    if table.row_count:
        console.print(table)
    for line in summary(result.slim, result.before, result.quality):
        console.print("\n" + line, markup=False, highlight=False, soft_wrap=True)
    if result.quality is not None and result.quality.scores_after:
        console.print(score_table(result.quality.scores_before, result.quality.scores_after))
    said = f"\nThe smaller adapter is in {out}, and {SLIM_FILE} in it says what was done."
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return 0
