"""From an adapter's folder to that of a smaller one, with a report of what it costs."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.errors import ConfigError, Problem
from molora.evaluation import TaskScore, score_tasks
from molora.export.source import ADAPTER, Rows, Source, load_source, read_rows_for
from molora.plan import routing_reads
from molora.slim.adapter import Adapter, folder_bytes, read_adapter, write_adapter
from molora.slim.changes import Slimmed
from molora.slim.drop import check_dropped, drop_experts
from molora.slim.measure import Quality, output_errors, quality
from molora.slim.merge import check_number, merge_experts
from molora.slim.prune import Usage, prune_experts, prune_ranks
from molora.slim.refusals import DROP, MERGE, PRUNE, RANKS, RERANK, check_slimming
from molora.slim.report import report_of, write_card, write_report
from molora.slim.rerank import rerank
from molora.slim.statistics import expert_usage
from molora.writing import check_place, new_folder

_SLIM = "slimmed"
"""Name of the smaller adapter beside the old one, while they are compared."""

_OPERATIONS = {"below": PRUNE, "drop": DROP, "keep_energy": RANKS, "rank": RERANK, "merge_to": MERGE}
_NEED_DATA = ("below", "keep_energy")
_NEED_MOMENTS = ("rank", "merge_to")


@dataclass(frozen=True, kw_only=True)
class SlimOptions:
    """How to make an adapter smaller: one of the first five, and data.

    Attributes:
        below: Empty experts that fewer than this share of tokens select, in each module; 0 for those never selected.
        drop: Remove these experts everywhere.
        keep_energy: Take out the ranks that contribute least; those kept have this share of each module's energy.
        rank: Give every expert its best approximation of this rank.
        merge_to: Make similar experts one until this many are left.
        calibrate: Files of rows to look at; empty for the data the adapter was trained on, `None` for none. Nine
            tenths of them are looked at, and every tenth row is held out to measure with.
        rows: At most so many rows, drawn at random.
        seed: Of the draw.
        base_model: Name or folder to use instead of the one the adapter names.
        evaluate: Score the tasks that the adapter was trained on before and after, where its run kept rows for that.
    """

    below: float | None = None
    drop: Sequence[int] | None = None
    keep_energy: float | None = None
    rank: int | None = None
    merge_to: int | None = None
    calibrate: Sequence[str] | None = None
    rows: int = 256
    seed: int = 0
    base_model: str | None = None
    evaluate: bool = True

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems, "cannot prune like this")

    @property
    def operation(self) -> str:
        """Name of the option that says what is done."""
        return next(name for name in _OPERATIONS if getattr(self, name) is not None)

    def _problems(self) -> Iterator[Problem]:
        given = [name for name in _OPERATIONS if getattr(self, name) is not None]
        if len(given) != 1:
            said = "none is given" if not given else f"got {' and '.join(map(_flag, given))}"
            message = f"give one of {', '.join(map(_flag, _OPERATIONS))}; {said}. Run it on the result for another."
            yield Problem("", message)
        for name in given:
            if name in _NEED_DATA and self.calibrate is None:
                message = (
                    "is about what the experts do on data; give a file with --calibrate FILE, or --calibrate alone "
                    "for the data the adapter was trained on."
                )
                yield Problem(_flag(name), message)
        yield from self._impossible_numbers()
        for name in ("rows", "seed", "base_model", "evaluate"):
            unset = SlimOptions.__dataclass_fields__[name].default
            if self.calibrate is None and getattr(self, name) != unset:
                yield Problem(_flag(name), "is about calibration rows, which are not used; give --calibrate too.")

    def _impossible_numbers(self) -> Iterator[Problem]:
        if self.below is not None and not 0 <= self.below < 1:
            yield Problem("--below", f"got {self.below!r}; must be a share in [0, 1).")
        if self.keep_energy is not None and not 0 < self.keep_energy <= 1:
            yield Problem("--keep-energy", f"got {self.keep_energy!r}; must be a share in (0, 1].")
        if self.drop is not None and (not self.drop or min(self.drop) < 0):
            yield Problem("--drop", f"got {list(self.drop)}; must be indices of experts.")
        for name in ("rank", "merge_to", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(_flag(name), f"got {value!r}; must be at least 1.")


def _flag(name: str) -> str:
    return "--no-evaluate" if name == "evaluate" else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class SlimResult:
    """What was written.

    Attributes:
        before: The adapter as it was.
        slim: The smaller one, and what was done.
        quality: What it cost on held-out rows; `None` if there were none.
    """

    before: Adapter
    slim: Slimmed
    quality: Quality | None

    def as_json(self) -> dict[str, Any]:
        """As in `molora_slim.json`."""
        return report_of(self.slim, self.before, self.quality)


def slim_adapter(directory: str | Path, out: str | Path, **options: Any) -> SlimResult:
    """Write a smaller version of an adapter, with a report beside it.

    Nothing is overwritten, and `out` is there in the end, an adapter folder like any other, or not at all.

    Args:
        directory: Folder of the adapter.
        out: New folder.
        **options: See `SlimOptions`.

    Returns:
        What was written, and what it costs.

    Raises:
        ConfigError: If the options contradict each other, or this cannot be done to the adapter.
        DataError: If calibration rows cannot be read.
        WriteError: If `out` cannot be written.
    """
    chosen = SlimOptions(**options)
    check_place(out)
    before = read_adapter(directory)
    _check(before, chosen)
    source, usage, rows = None, None, None
    if chosen.calibrate is not None:
        source = load_source(str(directory), base_model=chosen.base_model)
        rows = read_rows_for(source, chosen.calibrate, [], chosen.rows, chosen.seed)
        seen = [*rows.parts["fit"], *rows.parts["choose"]]
        usage = expert_usage(source.model, seen, ADAPTER, moments=chosen.operation in _NEED_MOMENTS)
    slim = _slimmed(before, chosen, usage)
    with new_folder(out, needs=folder_bytes(slim.adapter, directory)) as folder:
        write_adapter(slim.adapter, folder, beside=directory)
        found = None if source is None or rows is None else _measured(slim, source, rows, folder, chosen.evaluate)
        result = SlimResult(before, slim, found)
        write_report(result.as_json(), folder)
        write_card(slim, before, found, folder)
    return result


def _check(before: Adapter, options: SlimOptions) -> None:
    """Refuse what this adapter cannot become, before its base model is loaded."""
    check_slimming(before.config, _OPERATIONS[options.operation])
    if options.drop is not None:
        check_dropped(before.config, options.drop)
    if options.merge_to is not None:
        check_number(before, options.merge_to)


def _slimmed(adapter: Adapter, options: SlimOptions, usage: Usage | None) -> Slimmed:
    if options.drop is not None:
        return drop_experts(adapter, options.drop, usage)
    if options.rank is not None:
        return rerank(adapter, options.rank, usage)
    if options.merge_to is not None:
        return merge_experts(adapter, options.merge_to, usage)
    assert usage is not None  # checked with the options
    if options.keep_energy is not None:
        return prune_ranks(adapter, usage, options.keep_energy)
    assert options.below is not None
    return prune_experts(adapter, usage, options.below)


def _measured(slim: Slimmed, source: Source, rows: Rows, folder: Path, evaluate: bool) -> Quality | None:
    """Compare the written adapter with the old one, and note each module's error."""
    held_out = rows.parts["judge"]
    if slim.adapter.config.num_experts != source.config.num_experts and "scores" in routing_reads(source.config):
        slim.notes.append("Nothing was measured: the rows have an `expert_scores` for each of the old experts.")
        return None
    with tempfile.TemporaryDirectory() as scratch:
        source.model.load_adapter(_comparable(slim.adapter, folder, Path(scratch)), _SLIM)
    try:
        for module, error in output_errors(source.model, held_out, ADAPTER, _SLIM).items():
            slim.modules[module].error = error
        score = functools.partial(_scores, source, rows) if evaluate and rows.scored else None
        return quality(source.model, held_out, ADAPTER, _SLIM, score)
    finally:
        source.model.delete_adapter(_SLIM)


def _scores(source: Source, rows: Rows) -> list[TaskScore]:
    longest = source.run.evaluation.eval_max_new_tokens if source.run is not None else 64
    return score_tasks(source.model, source.tokenizer, rows.scored, max_new_tokens=longest, progress=True)


def _comparable(adapter: Adapter, folder: Path, scratch: Path) -> str:
    """A folder that loads beside the old adapter: PEFT allows trained biases of the base model to one adapter only."""
    if adapter.config.bias == "none":
        return str(folder)
    whole = tuple(f".{name}." for name in adapter.config.modules_to_save or ())
    own = {
        key: value
        for key, value in adapter.tensors.items()
        if ".molora_" in key or not key.endswith(".bias") or any(name in key for name in whole)
    }
    write_adapter(Adapter(dataclasses.replace(adapter.config, bias="none"), own), scratch)
    return str(scratch)
