"""HTML and SVG put together so that every text is escaped, unless it was put together here."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

_EMPTY = ("br", "rect", "circle", "line", "path", "polyline", "input", "meta", "col")


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *children: str | None, **attributes: Any) -> Html:
    """An element.

    Args:
        name: Its name.
        *children: Texts, which are escaped, and markup, which is not; `None` is left out.
        **attributes: Values of any kind; `None` and `False` are left out, `True` stands alone. A `_` at the end of a
            name is dropped, others become `-`.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _EMPTY and not children:
        return Html(f"<{name}{given}/>" if name not in ("br", "input", "meta", "col") else f"<{name}{given}>")
    return Html(f"<{name}{given}>{joined(*children)}</{name}>")


def joined(*children: str | None) -> Html:
    """Texts and markup one after another."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children if child))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: int, caption: str | None = None) -> Html:
    """A table that scrolls by itself if it is wider than the page.

    Args:
        columns: Heads.
        rows: Cells.
        numbers: The column from which on there are numbers.
        caption: What it shows, for those who do not see it.
    """
    kinds = ["num" if index >= numbers else None for index in range(len(columns))]
    head = tag("tr", *(tag("th", name, scope="col", class_=kind) for name, kind in zip(columns, kinds, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    inner = tag("table", tag("caption", caption) if caption else None, tag("thead", head), tag("tbody", *body))
    return scrolling(inner, caption or "table")


def scrolling(inner: Html, label: str) -> Html:
    """Something wide, in a box that scrolls and that the keyboard reaches."""
    return tag("div", inner, class_="wide", tabindex="0", role="region", aria_label=label)


def facts(values: dict[str, str]) -> Html:
    """Names and what they are."""
    pairs = [tag("div", tag("dt", name), tag("dd", value)) for name, value in values.items()]
    return tag("dl", *pairs, class_="facts")


def embedded(name: str, values: Any) -> Html:
    """Data for the page's script; nothing in it can end the element."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    safe = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return tag("script", Html(safe), type="application/json", id=name)
