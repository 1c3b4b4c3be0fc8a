"""Names of models and data as strangers may see them: no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

from molora.base import PACKAGED
from molora.runfile.datasets import looks_local

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_CACHED = re.compile(r"[/\\]models--([^/\\]+)[/\\]snapshots[/\\]")
"""Where the hub's library keeps a model that it downloaded."""


def hub_id(name: str | None) -> str | None:
    """The id on the hub that a name is; `None` for a folder and for the packaged model."""
    if not name:
        return None
    cached = _CACHED.search(name)
    if cached:
        return cached[1].replace("--", "/", 1)
    if name == PACKAGED or looks_local(name, Path()) or not _HUB_ID.match(name):
        return None
    return name


def last_part(name: str) -> str:
    """What a name or path ends with; the packaged model's name for the folder it was converted into."""
    last = PureWindowsPath(name).name if is_path(name) else name
    return PACKAGED if re.fullmatch(rf"{PACKAGED}-v\d+", last) else last


def is_path(text: str) -> bool:
    """Whether a text is a path that says where things lie on a machine."""
    return text.startswith(("/", "~", "./", "../", "file:")) or PureWindowsPath(text).is_absolute()
