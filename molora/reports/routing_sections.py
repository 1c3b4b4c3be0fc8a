"""The sections of a page about routing: load, experts per token, tasks, likeness, and one text token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from molora.plan import layer_of
from molora.reports import heat
from molora.reports.charts import bar_chart, curve_chart
from molora.reports.data import Affinity, Cosines, Curve, Loads, Matrix, TokenRouting, Usage
from molora.reports.likeness import ALIKE_ABOVE
from molora.reports.markup import Html, joined, table, tag
from molora.reports.names import by_kind, shortened
from molora.reports.sections import missing, prose, section
from molora.reports.summary import dead_experts

_MOST_PAIRS = 30


def select(key: str, names: Sequence[str], label: str) -> Html:
    """A choice of which heatmap is shown."""
    options = [tag("option", name) for name in names]
    return tag(
        "div",
        tag("label", label, for_=f"{key}-choice"),
        tag("select", *options, id=f"{key}-choice", data_for=key, autocomplete="off"),
        class_="controls",
    )


def mean_rows(matrices: Sequence[Matrix]) -> Matrix:
    """Mean of matrices, over those that have the widest rows."""
    widest = max(len(row) for matrix in matrices for row in matrix)
    shown: Matrix = []
    for rows in zip(*matrices, strict=True):
        own = [row for row in rows if len(row) == widest]
        shown.append([round(sum(column) / len(own), 4) for column in zip(*own, strict=True)] if own else [])
    return shown


def load_views(loads: Loads) -> tuple[list[str], list[Matrix]]:
    """What the heatmap over training can show, `[steps, E]`: each linear, the most uneven first, and their mean."""
    if not loads.steps or not loads.modules:
        return [], []
    order = sorted(
        range(len(loads.modules)), key=lambda index: -max(loads.end[index], default=0) * loads.experts[index]
    )
    each = [[step[index] for step in loads.over_time] for index in order]
    return [*(loads.modules[index] for index in order), "mean over linears"], [*each, mean_rows(each)]


def panel_order(loads: Loads) -> list[int]:
    """Linears in the order in which the small heatmaps show them."""
    return [index for own in by_kind(loads.modules).values() for index, _ in own]


def load(found: Loads | str) -> Html:
    """Load of every expert of every linear, at the end and over training."""
    title = "Load of experts"
    if isinstance(found, str):
        return section("load", title, missing(found))
    dead, whole = dead_experts(found)
    said = (
        "Share of the selections that falls on each expert of each linear; rows are linears by layer, columns "
        "experts. "
        f"Dead experts, with less than a tenth of an even share: {dead} of {whole}."
    )
    panels = []
    for kind, own in by_kind(found.modules).items():
        experts = max(found.experts[index] for index, _ in own)
        panels.append(
            heat.small(heat.LOAD, [_whole(found, index) for index, _ in own], [name for _, name in own], kind, experts)
        )
    inner = [tag("p", said), _load_legend(), _slider(found), tag("div", *panels, class_="panels")]
    names, views = load_views(found)
    if views:
        rows = [f"step {step}" for step in found.steps]
        columns = [str(index) for index in range(max(found.experts))]
        picture = heat.matrix(heat.LOAD, views[0], rows, columns, "load over training — " + names[0], "load")
        inner += [tag("h3", "Over training"), select("load", names, "Linear, most uneven first"), picture]
    else:
        advice = "How it came about is not known: give the `output_dir` of `molora train`, or a checkpoint in it."
        inner.append(missing(advice))
    return section("load", title, *inner)


def _whole(loads: Loads, index: int) -> list[float]:
    """The end's row of a linear; where it did not run, nothing falls on any expert."""
    return loads.end[index] or [0.0] * loads.experts[index]


def _slider(loads: Loads) -> Html | None:
    if not loads.steps:
        return tag("p", "Measured on ", loads.origin, ".", class_="note")
    last = str(len(loads.steps))
    said = tag("output", f"at the end: {loads.origin}", id="step-said", for_="step", class_="note")
    options = {"type": "range", "min": "0", "max": last, "value": last, "id": "step", "autocomplete": "off"}
    return tag("div", tag("label", "Step", for_="step"), tag("input", **options), said, class_="controls")


def _load_legend() -> Html:
    keys = [("even share", "high", 0.0), ("twice", "high", 0.5), ("four times or more", "high", 1.0)]
    keys += [("half", "low", 0.5), ("a quarter or less", "low", 1.0), ("dead", "dead", 1.0)]
    return tag("ul", *(tag("li", _square(kind, opacity), text) for text, kind, opacity in keys), class_="legend")


def _square(kind: str, opacity: float) -> Html:
    cell = tag("rect", x=1, y=1, width=12, height=12, rx=2, class_=f"cell {kind}", fill_opacity=opacity)
    return tag("svg", cell, width=14, height=14, aria_hidden="true")


def usage(found: Usage | str) -> Html:
    """Experts per token and thresholds."""
    title = "Experts per token"
    if isinstance(found, str):
        return section("usage", title, missing(found))
    labels = [str(index) if len(found.experts) <= 17 or not index % 4 else "" for index in range(len(found.experts))]
    charts = [
        bar_chart(
            "Experts that a token uses", found.experts, labels, (found.mean + 0.5, f"mean {found.mean:.2f}"), "share"
        )
    ]
    if found.thresholds is not None:
        bins, end = found.thresholds.shares, found.thresholds.end
        labels = [f"{end * index / len(bins):.3g}" if not index % 8 else "" for index in range(len(bins))]
        place = found.thresholds.mean / end * len(bins)
        mark = (place, f"mean {found.thresholds.mean:.3g}")
        charts.append(bar_chart("Learned thresholds", bins, labels, mark, f"up to {end:.3g}"))
    by_layer = _by_layer(found.by_module)
    if len(by_layer) > 1:
        charts.append(curve_chart(Curve("Experts per token by layer", True, {"train": by_layer})))
    said = f"Of {found.tokens:,} tokens of held-out rows, averaged over {len(found.by_module)} linears."
    return section("usage", title, tag("p", said), tag("div", *charts, class_="charts"))


def _by_layer(values: Mapping[str, float]) -> list[tuple[float, float]]:
    """Means over the linears of each layer."""
    own: dict[int, list[float]] = {}
    for name, value in values.items():
        layer = layer_of(name)
        if layer is not None:
            own.setdefault(layer, []).append(value)
    return [(float(layer), sum(found) / len(found)) for layer, found in sorted(own.items())]


def affinity(found: Affinity | str) -> Html:
    """What experts each task uses."""
    title = "Tasks and experts"
    if isinstance(found, str):
        return section("tasks", title, missing(found))
    names, views = affinity_views(found)
    best = max(range(len(found.bits)), key=lambda index: found.bits[index])
    mean = sum(found.bits) / len(found.bits)
    said = (
        f"Share of each task's mixing weight that an expert gets. Knowing the expert tells {mean:.3f} bits about the "
        f"task, a mean over {len(found.bits)} linears, and {found.bits[best]:.3f} bits in `{found.modules[best]}`; "
        f"to know the task for sure would be {math.log2(len(found.tasks)):.2f} bits. Few tokens "
        "make it larger than it is."
    )
    columns = [str(index) for index in range(max(len(row) for row in views[0]))]
    picture = heat.matrix(heat.SHARE, views[0], found.tasks, columns, "tasks and experts — " + names[0], "tasks")
    by_layer = _by_layer(dict(zip(found.modules, found.bits, strict=True)))
    chart = (
        curve_chart(Curve("Bits about the task, by layer", True, {"train": by_layer})) if len(by_layer) > 1 else None
    )
    counted = ", ".join(f"{task} {number:,}" for task, number in zip(found.tasks, found.tokens, strict=True))
    return section(
        "tasks",
        title,
        tag("p", prose(said)),
        select("tasks", names, "Linear, most bits first"),
        picture,
        tag("p", f"Tokens: {counted}.", class_="note"),
        tag("div", chart, class_="charts") if chart else None,
    )


def affinity_views(found: Affinity) -> tuple[list[str], list[Matrix]]:
    """Linears, those that tell most about the task first, with their bits."""
    order = sorted(range(len(found.modules)), key=lambda index: -found.bits[index])
    names = [f"{found.modules[index]}: {found.bits[index]:.3f} bits" for index in order]
    return names, [found.weights[index] for index in order]


def likeness(found: Cosines | str) -> Html:
    """Dead and duplicate experts, by what they add."""
    title = "Duplicate experts"
    if isinstance(found, str):
        return section("likeness", title, missing(found))
    most = max(found.labels, key=len)
    names, _ = cosine_views(found)
    said = (
        "Cosine of what two experts add to the same linear, whatever they read: 1 is the same, 0 has nothing in "
        "common. "
        f"{len(found.pairs) or 'No'} pair{'s' * (len(found.pairs) != 1)} in {len(found.modules)} linears "
        f"{'has' if len(found.pairs) == 1 else 'have'} more than {ALIKE_ABOVE:g}."
    )
    inner = [tag("p", said), select("cosine", names, "Linear")]
    inner.append(heat.matrix(heat.COSINE, found.mean, most, most, "cosines of experts — " + names[0], "cosine"))
    if found.pairs:
        short = dict(zip(found.modules, shortened(found.modules), strict=True))
        rows = [
            [short[name], first, second, f"{value:.3f}"] for name, first, second, value in found.pairs[:_MOST_PAIRS]
        ]
        inner.append(table(["linear", "expert", "and", "cosine"], rows, 1, "Pairs that are nearly the same"))
        if len(found.pairs) > _MOST_PAIRS:
            inner.append(tag("p", f"And {len(found.pairs) - _MOST_PAIRS} more.", class_="note"))
        inner.append(tag("p", prose("`molora prune DIR OUT --merge-to N` makes one of those that do alike.")))
    if found.empty:
        listed = ", ".join(f"{expert} of {name}" for name, expert in found.empty[:_MOST_PAIRS])
        more = f", and {len(found.empty) - _MOST_PAIRS} more" if len(found.empty) > _MOST_PAIRS else ""
        inner.append(tag("p", f"Experts that add nothing: {listed}{more}."))
    return section("likeness", title, *inner)


def cosine_views(found: Cosines) -> tuple[list[str], list[Matrix]]:
    """The mean over linears, and each linear."""
    return ["mean over linears", *found.modules], [found.mean, *found.matrices]


def tokens(found: TokenRouting | str) -> Html:
    """A text, its tokens in the colours of their most used experts."""
    title = "A text, token by token"
    if isinstance(found, str):
        return section("text", title, missing(found))
    experts = len(found.weights[0][0])
    said = (
        f"This is {found.origin}. A token has the colour and the number of the expert that weighs most in it, and its "
        "weights show as the pointer or the keyboard's arrows reach it."
    )
    choice = tag(
        "div",
        tag("label", "Averaged over", for_="token-group"),
        tag("select", *(tag("option", name) for name in found.groups), id="token-group", autocomplete="off"),
        class_="controls",
    )
    legend = tag("ul", *(_key(expert) for expert in range(experts)), class_="legend")
    marks = [_token(piece, weights) for piece, weights in zip(found.pieces, found.weights[0], strict=True)]
    more = tag("p", f"And {found.left_out:,} tokens more.", class_="note") if found.left_out else None
    panel = tag("div", class_="panel", id="token-panel", aria_live="polite")
    text = tag("div", *marks, class_="tokens", id="tokens", role="group", aria_label="tokens")
    return section("text", title, tag("p", said), choice, legend, tag("div", panel, text), more)


def _look(expert: int) -> str:
    return f"e{expert % 8}" + (" more" if expert >= 16 else " again" if expert >= 8 else "")


def _key(expert: int) -> Html:
    return tag("li", tag("span", class_=f"swatch {_look(expert)}"), f"expert {expert}")


def _token(piece: str, weights: Sequence[float]) -> Html:
    order = sorted(range(len(weights)), key=lambda expert: -weights[expert])
    title = ", ".join(f"expert {expert}: {weights[expert]:.1%}" for expert in order[:3])
    shown = piece.replace("\n", "⏎") or "·"
    button = tag(
        "button", shown, tag("sup", str(order[0])), class_=f"token {_look(order[0])}", title=title, type="button"
    )
    return joined(button, tag("br") if "\n" in piece else None)
