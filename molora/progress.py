"""One progress bar for everything that may take more than two seconds; what takes less shows none."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")

DELAY = 2.0
"""Seconds after which a bar appears."""


def tracked(items: Iterable[T], desc: str, unit: str, *, total: int | None = None, shown: bool = True) -> Iterable[T]:
    """Go through items behind a bar.

    Args:
        items: What is worked on.
        desc: What is done, such as `tokenising`.
        unit: What one item is.
        total: How many there are; `None` to ask `items`.
        shown: Whether to show anything. Of several processes the first one does.
    """
    return tqdm(items, desc=desc, unit=unit, total=total, leave=False, delay=DELAY, disable=not (shown and is_first()))


def bar(total: int, desc: str, unit: str, *, shown: bool = True) -> Any:
    """Like `tracked`, but moved by hand, in a `with` block, with `update(n)`."""
    return tqdm(total=total, desc=desc, unit=unit, leave=False, delay=DELAY, disable=not (shown and is_first()))


def is_first() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one."""
    return os.environ.get("RANK", "") in ("", "0")
