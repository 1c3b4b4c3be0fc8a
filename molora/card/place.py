"""Our part of a model card between two comments; everything outside them is the author's, and stays."""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from peft import __version__ as peft_version

CARD_FILE = "README.md"
STAGING = "_saving"
"""Folder in that of an adapter, in which trainers save before they put each file into its place."""
VERSIONS = "### Framework versions"
"""The heading below which PEFT writes its version, into any card that does not name it."""

_BEGIN = "<!-- molora:begin. Saving the adapter again replaces the text down to molora:end. Write above or below. -->"
_END = "<!-- molora:end -->"
_BEGIN_MARK, _END_MARK = re.compile(r"<!-- molora:begin\b[^>]*-->"), re.compile(r"<!-- molora:end\b[^>]*-->")
_OF_PEFT = re.compile(rf"\s*{VERSIONS}\s*- PEFT [^\s]+\s*$")


def read_card(path: Path) -> ModelCard:
    """Read a card; an empty one if there is none.

    Raises:
        ValueError: If its front matter cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    if not REGEX_YAML_BLOCK.search(text):
        text = f"---\n\n---\n{text}"  # the hub's library warns of what is usual here
    try:
        return ModelCard(text)
    except Exception as error:  # of the hub's library and of the YAML parser it uses
        raise ValueError(str(error)) from error


def is_ours(text: str) -> bool:
    """Whether a card has a part that molora wrote."""
    return _marks(text) is not None


def is_template(text: str) -> bool:
    """Whether a card's text is nothing but the template that PEFT writes, which says nothing."""
    allowed = set(_lines(str(ModelCard.from_template(ModelCardData()).text)))
    found = _lines(text)
    versions = [line for line in found if line.startswith("- PEFT ")]
    return all(line in allowed or line == VERSIONS or line in versions for line in found)


def placed(text: str, ours: str, title: str) -> str:
    """The text of a card with our part in it.

    Args:
        text: The text so far, without front matter.
        ours: What stands between the comments.
        title: Heading of a new card; the author may change it.
    """
    block = f"{_BEGIN}\n\n{_END_MARK.sub('', ours).strip()}\n\n{_END}"
    marks = _marks(text)
    if marks is not None:
        above, below = text[: marks[0]], text[marks[1] :]
    elif is_template(text):
        above, below = f"# {title}\n\n", "\n"
    else:
        # A mark that lost its other half would swallow the author's text at the next save.
        kept = _END_MARK.sub("", _BEGIN_MARK.sub("", text))
        above, below = _OF_PEFT.sub("", kept).strip() + "\n\n", "\n"
    return above.lstrip() + block + below


def with_front(front: dict[str, object], text: str) -> str:
    """A card: its front matter and its text."""
    return f"---\n{yaml_dump(front, sort_keys=False, line_break=None).strip()}\n---\n\n{text.strip()}\n"


def write_card(path: Path, content: str) -> None:
    """Write a card so that a killed process leaves the old one or the new one."""
    if path.is_file() and path.read_text(encoding="utf-8") == content:
        return
    partial = path.with_name(f"_{path.name}")  # uploads to the hub leave out what begins so
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def version_lines(others: dict[str, str]) -> list[str]:
    """Versions of packages, PEFT's as PEFT itself looks for it."""
    return [VERSIONS, "", f"- PEFT {peft_version}", *(f"- {name} {version}" for name, version in others.items())]


def _marks(text: str) -> tuple[int, int] | None:
    """Where our part begins and ends."""
    begin = _BEGIN_MARK.search(text)
    end = begin and _END_MARK.search(text, begin.end())
    return (begin.start(), end.end()) if begin and end else None


def _lines(text: str) -> list[str]:
    return [stripped for line in text.splitlines() if (stripped := line.strip())]
