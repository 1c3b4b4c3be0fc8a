"""Everything a report says, from the folder of an adapter and, unless it is left out, a pass over rows."""

from __future__ import annotations

import json
from dataclasses import dataclass

from molora.config import MoLoraConfig
from molora.data import TaskCollator, TaskData
from molora.errors import ConfigError, MoloraError
from molora.folders import CONFIG_FILE
from molora.loaded import load_adapted
from molora.plan import most_experts, routing_spec
from molora.reports.about import about, formula, versions
from molora.reports.account import account_of
from molora.reports.data import Affinity, Report, TokenRouting, Usage
from molora.reports.folder import Folder, read_folder
from molora.reports.likeness import cosines_of
from molora.reports.routing import MOST_TOKENS, affinity_of, end_loads, token_routing, usage_of
from molora.reports.rows import Options, pieces_of, rows_of, text_batch, tokenised
from molora.reports.training import curves_of, loads_of, scores_of
from molora.reports.watch import watch_rows, watch_text

ROWS = 16
"""Rows of each task that are looked at, unless told otherwise."""


@dataclass(frozen=True)
class _Routing:
    """What a pass over rows showed, or sentences that say why there was none."""

    usage: Usage | str
    affinity: Affinity | str
    tokens: TokenRouting | str
    loads: dict[str, list[float]] | None = None
    origin: str = ""
    base: int | None = None


def gather(directory: str, options: Options) -> Report:
    """Gather a report; only the adapter's folder is read, and the base model if rows are looked at.

    Args:
        directory: Folder of an adapter or a run, or a checkpoint in one.
        options: What is looked at.

    Raises:
        ConfigError: If there is no usable adapter, or the options contradict each other.
        DataError: If rows that were named cannot be used.
        MoloraError: If the base model cannot be loaded.
    """
    folder = read_folder(directory)
    adapter, config = folder.adapter, folder.adapter.config
    options.check(config)
    seen = _routing(folder, options)
    text = folder.run_text
    return Report(
        _title(folder),
        about(folder),
        formula(config),
        scores_of(folder),
        curves_of(folder),
        loads_of(folder, seen.loads, seen.origin),
        seen.usage,
        seen.affinity,
        cosines_of(adapter),
        seen.tokens,
        account_of(adapter, seen.base),
        (text, True)
        if text is not None
        else ("No run file lies beside the adapter; `molora train` leaves one.", False),
        _config_text(folder),
        versions(config),
        folder.notes,
    )


def _title(folder: Folder) -> str:
    path = folder.path.absolute()
    return f"{path.parent.name}, {path.name}" if folder.is_checkpoint else path.name


def _config_text(folder: Folder) -> str:
    text = (folder.path / CONFIG_FILE).read_text(encoding="utf-8")
    return json.dumps(json.loads(text), indent=2, ensure_ascii=False)


def _without(reason: str, text: bool = True) -> _Routing:
    return _Routing(reason, reason, reason if text else "")


def _routing(folder: Folder, options: Options) -> _Routing:
    config = folder.adapter.config
    if not options.routing:
        return _without("Left out by `--no-routing`. Without it, rows run through the base model and show this.")
    if not config.is_routed:
        return _without("This adapter routes nothing: its experts always weigh the same.")
    tasks, origin = rows_of(folder, options)
    if not tasks and options.text is None:
        return _without(origin)
    return _looked_at(folder, config, options, tasks, origin)


def _looked_at(folder: Folder, config: MoLoraConfig, options: Options, tasks: list[TaskData], origin: str) -> _Routing:
    """Load the base model and run rows and a text through it."""
    try:
        model, tokenizer = load_adapted(str(folder.path), config, options.base_model)
    except ConfigError:
        raise
    except MoloraError as error:
        raise MoloraError(f"{error} For a report that needs no base model, add --no-routing.") from error
    known = tokenised(folder, tasks, tokenizer, options.rows or ROWS)
    highest = routing_spec(config, most_experts(config.num_experts)).max_threshold
    collate = TaskCollator(int(tokenizer.pad_token_id))
    seen = watch_rows(model, known, collate, options.rows or ROWS, highest)
    batch = text_batch(options.text, known, tokenizer)
    tokens: TokenRouting | str = "No row was there to show."
    if batch is not None:
        ids = batch[0]["input_ids"][0].tolist()
        pieces = pieces_of(ids[:MOST_TOKENS], tokenizer)
        tokens = token_routing(watch_text(model, batch[0]), pieces, batch[1], len(ids) - len(pieces))
    own = sum(value.numel() for name, value in model.named_parameters() if ".molora_" in name)
    base = model.get_nb_trainable_parameters()[1] - own  # which knows how 4-bit ones are packed
    if not seen.sums:
        reason = origin if not tasks else "No linear was routed while the rows ran."
        return _Routing(reason, reason, tokens, base=base)
    counted = sum(min(len(task.dataset), options.rows or ROWS) for task in known)
    words = f"{counted} held-out rows of {len(known)} task{'s' * (len(known) > 1)} ({origin})"
    names = [task.name for task in known]
    return _Routing(usage_of(seen, highest), affinity_of(seen, names), tokens, end_loads(seen), words, base)
