"""The report of a slimming: a file beside the adapter, and a table for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from molora._version import __version__
from molora.card.place import CARD_FILE, with_front
from molora.shown import hub_id, last_part
from molora.slim.adapter import Adapter
from molora.slim.changes import ModuleChange, Slimmed
from molora.slim.measure import Quality

SLIM_FILE = "molora_slim.json"
"""Written beside the adapter: what was removed from each module, and what it cost."""


def report_of(slim: Slimmed, before: Adapter, quality: Quality | None = None) -> dict[str, Any]:
    """What is written to `molora_slim.json`.

    Args:
        slim: What was done.
        before: The adapter it was done to.
        quality: What it cost on held-out rows, if that was measured.
    """
    return {
        "operation": slim.operation,
        "options": slim.options,
        "exact_on_calibration_data": slim.exact,
        "notes": slim.notes,
        "parameters": {"before": before.parameters(), "after": slim.adapter.parameters()},
        "quality": None if quality is None else quality.as_dict(),
        "modules": {name: asdict(change) for name, change in slim.modules.items()},
    }


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report into an adapter folder."""
    (folder / SLIM_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def write_card(slim: Slimmed, before: Adapter, quality: Quality | None, folder: Path) -> None:
    """Write a model card into an adapter folder: what was done to it, and what every adapter's card says."""
    # That part reads what reports read, and they read slimmed adapters.
    from molora.card.job import update_card

    card = with_front({"library_name": "peft"}, changes_text(slim, before, quality))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    update_card(folder)


def changes_text(slim: Slimmed, before: Adapter, quality: Quality | None) -> str:
    """What the card of a smaller adapter begins with: what was done, and the numbers of `molora_slim.json`."""
    base = str(before.config.base_model_name_or_path or "")
    done = ", ".join(f"{name} = {value}" for name, value in slim.options.items())
    lines = [
        *("# A smaller mixture of LoRA experts", ""),
        f"Made by molora {__version__} from an adapter of {hub_id(base) or last_part(base) or 'a model'}: "
        f"{slim.operation}, with {done}. `import molora` lets PEFT load it.",
    ]
    for line in summary(slim, before, quality):
        lines += ["", line]
    if quality is not None and quality.scores_after:
        old = {(one.task, one.metric): one.value for one in quality.scores_before}
        lines += ["", "| task | metric | rows | before | after |", "|---|---|---|---|---|"]
        for one in quality.scores_after:
            earlier = old.get((one.task, one.metric))
            shown = "-" if earlier is None else f"{earlier:.3f}"
            lines.append(f"| {one.task} | {one.metric} | {one.count} | {shown} | {one.value:.3f} |")
    return "\n".join([*lines, "", f"`{SLIM_FILE}` has the numbers of every module."]) + "\n"


def slim_table(modules: Mapping[str, ModuleChange], rows: int = 40) -> Table:
    """What was done to each module, those first whose output changed most.

    Args:
        modules: The changes.
        rows: How many to show.
    """
    table = Table("module", "removed")
    for name in ("rank", "parameters", "gate mass removed", "output error"):
        table.add_column(name, justify="right")
    changed = [(name, one) for name, one in modules.items() if _differs(one)]
    ordered = sorted(changed, key=lambda pair: -(pair[1].error or 0.0))
    for name, one in ordered[:rows]:
        table.add_row(
            name,
            _removed(one),
            f"{one.rank_before} → {one.rank_after}",
            f"{one.parameters_before:,} → {one.parameters_after:,}",
            "-" if one.mass_removed is None else f"{one.mass_removed:.2%}",
            "-" if one.error is None else f"{one.error:.3g}",
        )
    if len(ordered) > rows:
        table.caption = f"and {len(ordered) - rows} more in {SLIM_FILE}"
    return table


def summary(slim: Slimmed, before: Adapter, quality: Quality | None) -> list[str]:
    """Sentences about the whole adapter."""
    old, new = before.parameters(), slim.adapter.parameters()
    changed = sum(map(_differs, slim.modules.values()))
    lines = [
        f"{slim.operation.capitalize()} in {changed} of {len(slim.modules)} modules: {new:,} of {old:,} parameters "
        f"are left ({new / old:.1%})."
    ]
    if slim.exact:
        lines.append("Exact on the calibration data: nothing that was removed had any weight there.")
    lines += slim.notes
    if quality is not None:
        lines.append(
            f"On {quality.tokens:,} held-out tokens: KL {quality.kl:.4g} nats, perplexity "
            f"{quality.perplexity_before:.4g} before and {quality.perplexity_after:.4g} after."
        )
    return lines


def _differs(change: ModuleChange) -> bool:
    merged = any(len(group) > 1 for group in change.groups)
    return bool(change.removed) or merged or change.rank_before != change.rank_after


def _removed(change: ModuleChange) -> str:
    if change.groups:
        return " ".join("+".join(map(str, group)) for group in change.groups if len(group) > 1)
    shown = ", ".join(map(str, change.removed[:8]))
    return shown + (f" and {len(change.removed) - 8} more" if len(change.removed) > 8 else "")
