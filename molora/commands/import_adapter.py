"""`molora import`: an adapter of another program as one of molora's, with the same outputs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from molora.errors import ConfigError, Problem
from molora.folders import WEIGHTS_FILE
from molora.imported.foreign import ImportedAdapter, import_adapter
from molora.writing import size


def run(
    folders: Sequence[str],
    out: str,
    *,
    base_model: str | None = None,
    preset: str | None = None,
    adapters: Sequence[str] = (),
) -> int:
    """Write the adapter to a new folder, and print what it is and what differs.

    Args:
        folders: The adapter's folder, or several of plain LoRAs.
        out: Where to write; must be empty or not exist.
        base_model: Name or folder; default the one the adapter names.
        preset: What mixes several plain LoRAs.
        adapters: `NAME=DIR`, the LoRAs of an X-LoRA adapter.

    Raises:
        ConfigError: Listing what cannot be imported exactly; nothing is written then.
        WriteError: If it cannot be written.
    """
    imported = import_adapter(folders, out, base_model=base_model, preset=preset, adapters=_named(adapters))
    console = Console()
    console.print(_table(imported))
    for note in imported.notes:
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
    console.print(_next_step(imported, len(folders)), markup=False, highlight=False, soft_wrap=True)
    return 0


def _named(adapters: Sequence[str]) -> dict[str, str]:
    """Read `NAME=DIR`, keeping the order."""
    named: dict[str, str] = {}
    problems = []
    for word in adapters:
        name, separator, folder = word.partition("=")
        if not (name and separator and folder):
            problems.append(
                Problem("--adapter", f"got {word!r}; must be NAME=DIR, with a name of the X-LoRA's config.")
            )
        elif name in named:
            problems.append(Problem("--adapter", f"{name!r} is given twice; give each adapter once."))
        named[name] = folder
    if problems:
        raise ConfigError(problems, "molora import cannot do this")
    return named


def _table(imported: ImportedAdapter) -> Table:
    config = imported.config
    table = Table("was", "is now", "experts", "modules", "size")
    weights = (imported.folder / WEIGHTS_FILE).stat().st_size
    table.add_row(imported.kind, imported.preset, str(config.num_experts), str(imported.modules), size(weights))
    return table


def _next_step(imported: ImportedAdapter, folders: int) -> str:
    same = (
        "Its outputs are those of the original, to rounding."
        if folders == 1
        else "Each expert is one of the adapters, exactly; how they are mixed is new."
    )
    if not imported.config.base_model_name_or_path:
        return (
            f"\n{same} The adapter names no base model; give one with --base-model to be able to use it by its folder."
        )
    return f'\n{same} Ask it something:\n  molora generate {imported.folder} --prompt "..."'
