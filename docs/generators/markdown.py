"""Pages of Markdown from paragraphs and tables."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

MARK = "<!-- Written by docs/generate.py from the code. Do not edit: run it again. -->"
"""The first line of every generated page; a file without it is never overwritten."""

WIDTH = 119


def page(title: str, *parts: str) -> str:
    """A page of paragraphs, tables and blocks."""
    return "\n\n".join([MARK, f"# {title}", *(part.strip("\n") for part in parts if part.strip())]) + "\n"


def paragraph(text: str) -> str:
    """One paragraph at the width of the docs."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ("---",) * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def block(text: str, language: str = "") -> str:
    """A block of code."""
    return f"```{language}\n{text.strip()}\n```"


def code(value: Any) -> str:
    """A value as YAML has it, as code."""
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def capital(text: str) -> str:
    """A text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
