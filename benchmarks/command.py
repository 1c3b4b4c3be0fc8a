"""What the commands have in common: their arguments, and a table of timed rows."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import checks, report
from benchmarks.harness import Measure, Pairs, Spread, clock_for, compare, noise_of, spread, verdict
from benchmarks.methods import Built, Method, Sizes, available, build, own_methods, reference_of
from benchmarks.peers import peer_methods
from molora.kernels import dispatch

Clock = Callable[[], float]
Maker = Callable[[Built, Clock], Measure]
"""Makes what is measured of a model."""

SAME = "A/A"
"""Start of the names of rows that compare the reference with itself."""


def parser(text: str, batch: int, length: int, pairs: int = 9) -> argparse.ArgumentParser:
    """Arguments that every timed command has; `text` is the module's docstring."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = Sizes()
    for name in ("hidden", "intermediate", "vocab", "layers", "heads", "experts", "rank", "top_k"):
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(size, name))
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--length", type=int, default=length, help="tokens of each row")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of base and adapters")
    made.add_argument("--threads", type=int, default=1, help="1 is timed by CPU time, more by the wall clock")
    made.add_argument("--pairs", type=int, default=pairs, help="runs of every row")
    made.add_argument("--only", nargs="*", default=[], metavar="WORD", help="names of rows, or words in them")
    made.add_argument("--no-peers", action="store_true", help="leave out other libraries")
    made.add_argument("--json", metavar="FILE", help="write everything measured there")
    return made


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    """The sizes that were asked for."""
    names = [field.name for field in dataclasses.fields(Sizes) if field.name != "dtype"]
    given = {name: getattr(arguments, name) for name in names}
    return Sizes(**given, dtype=getattr(torch, arguments.dtype))


def methods_of(arguments: argparse.Namespace, sizes: Sizes) -> tuple[list[Method], dict[str, str]]:
    """The rows that were asked for and can be built here, the reference first; and why others are not."""
    own, missing = available(own_methods(sizes), sizes)
    peers, not_here = ([], {}) if arguments.no_peers else peer_methods(sizes)
    missing |= not_here
    reference = reference_of(own)
    wanted = asked([method.name for method in (*own, *peers)] + list(missing), arguments.only)
    rows = [method for method in (*own, *peers) if method.name in wanted and method is not reference]
    return [reference, *rows], {name: why for name, why in missing.items() if name in wanted}


def asked(names: Sequence[str], words: Sequence[str]) -> set[str]:
    """The names that were asked for: a word that is one of them means it alone, others all that contain them."""
    if not words:
        return set(names)
    exact = {name.lower() for name in names}
    return {
        name
        for name in names
        for word in map(str.lower, words)
        if (word == name.lower() if word in exact else word in name.lower())
    }


@dataclass
class Row:
    """One measured line."""

    name: str
    kind: str
    pairs: Pairs
    spread: Spread
    note: str = ""

    def as_json(self, noise: float) -> dict[str, Any]:
        """Everything about it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "note": self.note,
            "median": self.spread.median,
            "low": self.spread.low,
            "high": self.spread.high,
            "verdict": verdict(self.spread, noise),
            "ratios": self.pairs.ratios,
            "seconds": self.pairs.seconds,
            "references": self.pairs.references,
        }


def measure_rows(
    methods: Sequence[Method], sizes: Sizes, make: Maker, clock: Clock, pairs: int, training: bool
) -> list[Row]:
    """Time every method against the first one, which is also timed against itself, at the start and at the end."""
    reference = methods[0]
    measure = make(build(reference, sizes, training=training), clock)
    again = [dataclasses.replace(reference, name=f"{SAME} {reference.name}, {when}") for when in ("first", "last")]
    rows = []
    for method in [again[0], *methods[1:], again[1]]:
        with checks.kernels(method.kernels):
            candidate = make(build(method, sizes, training=training), clock)
            result = compare(candidate, measure, pairs)
        del candidate
        gc.collect()
        rows.append(Row(method.name, method.kind, result, spread(result.ratios), method.note))
        found = rows[-1].spread
        progress = f"  {method.name}: {found.median:.2f} [{found.low:.2f}-{found.high:.2f}]"
        print(progress, file=sys.stderr, flush=True)
    return rows


def noise_in(rows: Sequence[Row]) -> float:
    """What the A/A rows of a table say about its noise."""
    return noise_of(row.spread for row in rows if row.name.startswith(SAME))


def columns_of(row: Row, reference: str, noise: float, total: Row | None, total_name: str) -> dict[str, Any]:
    """The cells of a timed row. The last column is a ratio of two medians, and so less certain than the first."""
    cells: dict[str, Any] = {
        "method": row.name,
        f"x {reference}": row.spread.median,
        "quartiles": f"{row.spread.low:.2f}-{row.spread.high:.2f}",
        "verdict": verdict(row.spread, noise),
    }
    if total is not None:
        cells[f"x {total_name}"] = row.spread.median / total.spread.median
    return cells


def compare_methods(
    command: str,
    arguments: argparse.Namespace,
    make: Maker,
    ids: Sequence[Tensor],
    training: bool,
    extra: Callable[[Row, Sequence[Row]], dict[str, Any]] = lambda row, rows: {},
    keep: Callable[[Method], bool] = lambda method: True,
) -> int:
    """Check, time and report all methods.

    Args:
        command: Its name.
        arguments: As `parser` gives them.
        make: Makes what is timed.
        ids: Inputs `[B, S]` that methods are checked on, one for each number of tokens that is timed.
        training: Whether gradients are part of it.
        extra: Further cells of a row, from it and all rows.
        keep: Which methods the command can run.

    Returns:
        The exit status.
    """
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    sizes = sizes_of(arguments)
    methods, missing = methods_of(arguments, sizes)
    missing |= {method.name: f"not in {command}: {method.note}" for method in methods if not keep(method)}
    methods = [method for method in methods if keep(method)]
    try:
        errors = [checks.check_methods(methods, sizes, given, training, training) for given in ids]
    except checks.WrongResultError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    clock, clock_name = clock_for(arguments.threads)
    rows = measure_rows(methods, sizes, make, clock, arguments.pairs, training)
    noise, reference = noise_in(rows), methods[0].name
    total_name = f"PEFT LoRA r={sizes.total_rank}"
    total = next((row for row in rows if row.name == total_name), None)
    cells = [columns_of(row, reference, noise, total, total_name) | extra(row, rows) for row in rows]
    shapes = dataclasses.asdict(sizes) | {"batch": arguments.batch, "length": arguments.length}
    shapes["dtype"] = arguments.dtype
    print(report.heading(command, arguments.threads, clock_name, shapes))
    print(report.table(list(cells[0]), cells))
    print(f"Noise from the A/A rows: {noise:.3f}; a smaller difference is {verdict(Spread(1, 1, 1), noise)!r}.")
    for name, why in missing.items():
        print(f"left out: {name}: {' '.join(why.split())}")
    report.write_json(
        arguments.json,
        command,
        arguments.threads,
        {
            "shapes": shapes,
            "clock": clock_name,
            "kernels": dispatch.backend(),
            "reference": reference,
            "noise": noise,
            "checked": errors,
            "rows": [row.as_json(noise) | extra(row, rows) for row in rows],
            "missing": missing,
        },
    )
    return 0
