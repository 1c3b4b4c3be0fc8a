"""`molora report`: one page about an adapter, and the same for model cards."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from molora.reports.job import gather
from molora.reports.page import html_page
from molora.reports.pictures import available, draw
from molora.reports.rows import Options
from molora.reports.summary import NO_PICTURES, markdown
from molora.writing import check_place, new_folder

PAGE, CARD = "report.html", "report.md"


def run(
    directory: str,
    out: str,
    *,
    data: Sequence[str] = (),
    text: str | None = None,
    rows: int | None = None,
    base_model: str | None = None,
    routing: bool = True,
) -> int:
    """Write a report into a new folder.

    Args:
        directory: Folder of an adapter or a run, or a checkpoint in one.
        out: New folder; nothing is overwritten.
        data: Files of rows to look at; without, the evaluation rows of the run.
        text: Text whose routing is shown token by token; without, a held-out row.
        rows: Rows of each task to look at.
        base_model: Base model to use instead of the one named in the adapter.
        routing: Run rows through the model; without, no base model is needed.

    Raises:
        ConfigError: If there is no usable adapter, or what is asked for is impossible.
        DataError: If rows that were named cannot be used.
        MoloraError: If the base model cannot be loaded.
        WriteError: If the folder cannot be written.
    """
    check_place(out)
    options = Options(data=tuple(data), text=text, rows=rows, base_model=base_model, routing=routing)
    report = gather(directory, options)
    console = Console()
    with new_folder(out) as folder:
        (folder / PAGE).write_text(html_page(report), encoding="utf-8")
        pictures = draw(report, folder) if available() else {}
        (folder / CARD).write_text(markdown(report, pictures), encoding="utf-8")
    for note in report.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(f"The report is in {out}: open {PAGE}.", markup=False, highlight=False, soft_wrap=True)
    if not available():
        console.print(NO_PICTURES, markup=False, highlight=False, soft_wrap=True)
    return 0
