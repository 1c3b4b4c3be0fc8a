"""A report as one HTML file that needs nothing else: no network, no fonts, no library."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template
from typing import Any

from molora._version import __version__
from molora.reports import routing_sections as routing
from molora.reports import sections
from molora.reports.data import Affinity, Cosines, Loads, Matrix, Report, TokenRouting
from molora.reports.markup import Html, embedded, joined, tag
from molora.routing.statistics import DEAD_BELOW

_SECTIONS = {
    "what": "What this is",
    "scores": "Scores",
    "training": "Training",
    "load": "Load",
    "usage": "Experts per token",
    "tasks": "Tasks",
    "likeness": "Duplicates",
    "text": "Text",
    "memory": "Memory",
    "configuration": "Configuration",
}


def html_page(report: Report) -> str:
    """The text of `report.html`.

    Its policy lets the page's own script run and no other, so that even markup that slipped through could do nothing.

    Args:
        report: The report.
    """
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_file("page.html")).substitute(
        title=joined(f"{report.title} · molora report"),
        version=__version__,
        style=_file("page.css"),
        script=script,
        script_hash=f"sha256-{digest}",
        body=_body(report),
    )


def _file(name: str) -> str:
    return (files("molora.reports") / name).read_text(encoding="utf-8")


def _body(report: Report) -> Html:
    links = [tag("li", tag("a", title, href=f"#{name}")) for name, title in _SECTIONS.items()]
    parts = [
        sections.what_it_is(report),
        sections.scores(report.scores),
        sections.curves(report.curves),
        routing.load(report.loads),
        routing.usage(report.usage),
        routing.affinity(report.affinity),
        routing.likeness(report.cosines),
        routing.tokens(report.tokens),
        sections.account(report.account),
        sections.configuration(report),
    ]
    return joined(
        tag("header", tag("p", "Mixture of LoRA experts", class_="kicker"), tag("h1", report.title)),
        tag("nav", tag("ul", *links), aria_label="sections"),
        _hatch(),
        tag("main", *parts, id="content"),
        tag("footer", f"Made by molora {__version__}. Everything in it came with the file; nothing is fetched."),
        embedded("data", page_data(report)),
    )


def _hatch() -> Html:
    """The pattern of dead experts."""
    lines = tag("path", d="M0 4 4 0M-1 1 1 -1M3 5 5 3")
    pattern = tag("pattern", lines, id="hatch", width=4, height=4, patternUnits="userSpaceOnUse")
    return tag("svg", tag("defs", pattern), width=0, height=0, aria_hidden="true", style="position:absolute")


def page_data(report: Report) -> dict[str, Any]:
    """What the page's controls can show beside what it shows as it loads."""
    data: dict[str, Any] = {"dead_below": DEAD_BELOW, "matrices": {}}
    if isinstance(report.loads, Loads):
        names, views = routing.load_views(report.loads)
        if views:
            data["loads"] = _load_steps(report.loads)
            place = {report.loads.modules[index]: at for at, index in enumerate(routing.panel_order(report.loads))}
            # The same numbers as in `loads`, which are many: only where they stand there.
            lines = [place[name] for name in names[:-1]]
            data["matrices"]["load"] = {"lines": lines, "values": views[-1:], "columns": max(report.loads.experts)}
    if isinstance(report.affinity, Affinity):
        _, shown = routing.affinity_views(report.affinity)
        data["matrices"]["tasks"] = {"values": shown, "columns": len(shown[0][0])}
    if isinstance(report.cosines, Cosines):
        _, shown = routing.cosine_views(report.cosines)
        data["matrices"]["cosine"] = {"values": shown, "columns": len(report.cosines.mean)}
    if isinstance(report.tokens, TokenRouting):
        data["tokens"] = {"pieces": report.tokens.pieces, "weights": report.tokens.weights}
    return data


def _load_steps(loads: Loads) -> dict[str, Any]:
    """Rows of the small heatmaps at each step, and at the end."""
    order = routing.panel_order(loads)
    rows: list[Matrix] = [[step[index] for index in order] for step in loads.over_time]
    rows.append([loads.end[index] or [0.0] * loads.experts[index] for index in order])
    names = [*(f"step {step}, while training" for step in loads.steps), f"at the end: {loads.origin}"]
    return {"rows": rows, "names": names, "experts": [loads.experts[index] for index in order]}
