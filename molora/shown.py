"""Names of models and data as strangers may see them: no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

from molora.base import PACKAGED
from molora.runfile.datasets import looks_local

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_CACHED = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]")
"""Where the hub's library keeps a model that it downloaded."""

_PART = r"""[^\s"'`,;:|()\[\]<>{}/\\]+"""
_PATH_WITHIN = re.compile(
    # Not behind a letter or a slash, as in `and/or` and `https://`.
    rf"""(?<![^\s"'`=(\[,;:|])(?:file:/*)?"""
    rf"""(?:~[\w.-]*(?:/{_PART})+|(?:/{_PART}){{2,}}|[A-Za-z]:(?:[/\\]{_PART})+|\\\\{_PART}(?:\\{_PART})+)[/\\]?"""
)
"""A path from a root or a home within a text; `/think` alone is none."""


def hub_id(name: str | None, beside: Path | None = None) -> str | None:
    """The id on the hub that a name is; `None` for a folder and for the packaged model.

    Args:
        name: The name.
        beside: A folder that relative names may start in, besides the current one.
    """
    if not name:
        return None
    cached = _CACHED.search(name)
    if cached:
        return cached[1].replace("--", "/", 1)
    if name == PACKAGED or not _HUB_ID.match(name):
        return None
    if looks_local(name, Path()) or (beside is not None and looks_local(name, beside)):
        return None
    return name


def last_part(name: str) -> str:
    """What a name or path ends with; the packaged model's name for the folder it was converted into."""
    last = PureWindowsPath(name).name if is_path(name) else name
    return PACKAGED if re.fullmatch(rf"{PACKAGED}-v\d+", last) else last


def is_path(text: str) -> bool:
    """Whether a text is a path that says where things lie on a machine."""
    return text.startswith(("/", "~", "./", "../", "file:")) or PureWindowsPath(text).is_absolute()


def without_paths(text: str) -> str:
    """A text in which paths of a machine are cut to their last part."""
    return _PATH_WITHIN.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)
