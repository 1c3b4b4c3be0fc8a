"""The sections of a page about the adapter and its training: what it is, scores, curves, memory, configuration."""

from __future__ import annotations

from collections.abc import Sequence

from molora.evaluation import LOWER_IS_BETTER, with_error
from molora.reports.charts import curve_chart
from molora.reports.data import Account, Curve, Report, Score
from molora.reports.markup import Html, facts, joined, table, tag
from molora.reports.summary import scored
from molora.writing import size


def section(name: str, title: str, *children: Html | None) -> Html:
    """A part of the page under its own heading."""
    return tag("section", tag("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title")


def missing(sentence: str) -> Html:
    """What stands in a section whose data is missing."""
    return tag("p", prose(sentence), class_="missing")


def prose(text: str) -> Html:
    """A sentence in which `code` is code."""
    return joined(*(tag("code", part) if index % 2 else part for index, part in enumerate(text.split("`"))))


def what_it_is(report: Report) -> Html:
    """Facts and the formula."""
    notes = [tag("p", prose(note), class_="missing") for note in report.notes]
    inner = [tag("p", report.formula, class_="formula"), facts(report.about), *notes]
    return section("what", "What this is", *inner)


def scores(found: list[Score] | str) -> Html:
    """Scores before and after, with standard errors."""
    if isinstance(found, str):
        return section("scores", "Scores on held-out rows", missing(found))
    rows = []
    for one in found:
        before, after = scored(one.before, one.errors[0], one.bound), scored(one.after, one.errors[1], one.bound)
        rows.append([one.task, one.metric.replace("_", " "), str(one.rows), before, after, _change(one)])
    note = (
        "± is a standard error over the rows, 0 where all score alike, of a change paired on them; "
        "≤ marks one that is at most that."
    )
    inner = table(["task", "metric", "rows", "before", "after", "change"], rows, 2, "Scores before and after training")
    return section("scores", "Scores on held-out rows", inner, tag("p", note, class_="note"))


def _change(score: Score) -> str:
    if score.before is None or score.after is None:
        return "–"
    change = score.after - score.before
    better = change < 0 if score.metric in LOWER_IS_BETTER else change > 0
    shown = with_error(change, score.change_error, "+")
    return tag("span", shown, class_="good" if better else "bad" if change else None)


def curves(found: list[Curve] | str) -> Html:
    """What the training logged."""
    if isinstance(found, str):
        return section("training", "Training", missing(found))
    inner: list[Html] = []
    for title, routing in (("Loss and metrics", False), ("Routing, averaged over linears", True)):
        own = [curve for curve in found if curve.routing is routing]
        if own:
            inner += [tag("h3", title), tag("div", *map(curve_chart, own), class_="charts")]
    return section("training", "Training", *inner, _numbers(found))


def _numbers(found: Sequence[Curve]) -> Html:
    """The same as a table, for who does not see the pictures."""
    columns = [(curve.title, name, dict(series)) for curve in found for name, series in curve.series.items()]
    steps = sorted({step for _, _, series in columns for step in series})
    heads = ["step", *(title if name == "train" else f"{title}, {name}" for title, name, _ in columns)]
    rows = [
        [f"{step:g}", *(f"{series[step]:.4g}" if step in series else "–" for _, _, series in columns)]
        for step in steps
    ]
    return tag("details", tag("summary", "The same in numbers"), table(heads, rows, 0, "Logged values by step"))


def account(found: Account) -> Html:
    """Parameters, bytes, and memory on a server."""
    total = sum(found.parameters.values())
    rows = [[kind, f"{number:,}", f"{number / max(total, 1):.1%}"] for kind, number in found.parameters.items()]
    rows.append(["all", f"{total:,}", "100.0%"])
    if found.base is not None:
        rows.append(["base model, frozen", f"{found.base:,}", f"adapter is {total / max(found.base, 1):.2%} of it"])
    stored = {f"{name}, on disk": size(number) for name, number in found.bytes.items()}
    server = (
        facts(found.serving)
        if found.serving
        else missing(f"vLLM cannot serve it with molora's plug-in: {found.refused}")
    )
    note = (
        "A server keeps a place for an adapter at the rank it was started with, on all linears; one adapter fills one."
    )
    return section(
        "memory",
        "Parameters and memory",
        table(["part", "parameters", "share"], rows, 1, "Parameters of the adapter"),
        tag("h3", "Memory"),
        facts(stored),
        tag("h3", "On a server"),
        server,
        tag("p", note, class_="note") if found.serving else None,
    )


def configuration(report: Report) -> Html:
    """The run file and the adapter's config as they are, and versions."""
    text, known = report.run_file
    run = _file("molora_run.yaml", text) if known else missing(text)
    return section(
        "configuration",
        "Configuration",
        run,
        _file("adapter_config.json", report.config),
        tag("h3", "Versions that made this page"),
        facts(report.versions),
    )


def _file(name: str, text: str) -> Html:
    return tag("details", tag("summary", name), tag("pre", text, tabindex="0", role="region", aria_label=name))
