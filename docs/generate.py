"""Writes the pages of docs/ that follow from the code: one for each preset, and the references.

`python docs/generate.py` writes them; with `--check` it only says which are not as they would be written, and exits
with 1 if any is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from generators import methods, reference
from generators.markdown import MARK

from molora.presets import PRESETS

DOCS = Path(__file__).parent


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Write the pages of docs/ that follow from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is stale")
    check = parser.parse_args().check
    pages = generated()
    old = stale(pages)
    for path in old:
        if not check:
            write(path, pages.get(path))
        sys.stdout.write(f"{'stale' if check else 'written' if path in pages else 'removed'}: docs/{path}\n")
    if check and old:
        sys.stdout.write("Run `python docs/generate.py`.\n")
    return int(check and bool(old))


def generated() -> dict[str, str]:
    """Every generated page: its path in docs/, and its text."""
    pages = {f"methods/{name}.md": methods.method(name) for name in PRESETS}
    pages["methods/README.md"] = methods.index()
    pages["reference/cli.md"] = reference.commands()
    pages["reference/config.md"] = reference.config()
    return pages


def stale(pages: Mapping[str, str], docs: Path = DOCS) -> list[str]:
    """Paths of the pages that are missing, differ, or are left from a preset that is gone."""
    there = {file.relative_to(docs).as_posix(): file.read_text(encoding="utf-8") for file in docs.rglob("*.md")}
    left = [path for path, text in there.items() if path not in pages and text.startswith(MARK)]
    return [path for path, text in pages.items() if there.get(path) != text] + sorted(left)


def write(path: str, text: str | None, docs: Path = DOCS) -> None:
    """Write a page, or remove it for `None`.

    Raises:
        FileExistsError: If a file is there that was not generated.
    """
    file = docs / path
    if file.exists() and not file.read_text(encoding="utf-8").startswith(MARK):
        raise FileExistsError(f"{file} was written by hand and would be lost; move it away.")
    if text is None:
        file.unlink()
        return
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
