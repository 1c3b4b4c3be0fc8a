"""A report in Markdown, for model cards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from molora.evaluation import with_error
from molora.reports.data import Account, Affinity, Cosines, Loads, Report, Score, Usage
from molora.reports.likeness import ALIKE_ABOVE
from molora.routing.statistics import DEAD_BELOW
from molora.writing import size

_PLAIN = str.maketrans({sign: "\\" + sign for sign in "\\`*_[]<>|#"})
NO_PICTURES = 'Pictures need matplotlib: `pip install "molora[report]"`, and run it again.'


def markdown(report: Report, pictures: Mapping[str, str]) -> str:
    """The text of `report.md`.

    Args:
        report: The report.
        pictures: Names of picture files, and what they show.
    """
    lines = [f"# {plain(report.title)}", "", f"`{report.formula}`", ""]
    lines += [f"- **{plain(name)}**: {plain(value)}" for name, value in report.about.items()]
    lines += ["", "## Scores", "", *score_lines(report.scores)]
    lines += ["", "## Routing", ""]
    found = (report.loads, report.usage, report.affinity, report.cosines)
    sentences = [prose(one) if isinstance(one, str) else sentence(one) for one in found]
    lines += [f"- {sentence}" for sentence in dict.fromkeys(sentences)]
    lines += ["", "## Parameters", "", *_account(report.account), ""]
    lines += [f"![{plain(shown)}]({name})\n" for name, shown in pictures.items()] or [NO_PICTURES, ""]
    return "\n".join([*lines, "`report.html` has the rest."]) + "\n"


def plain(text: str) -> str:
    """Text from data with nothing in it that Markdown or HTML would read."""
    return " ".join(text.split()).replace("&", "&amp;").translate(_PLAIN)


def prose(text: str) -> str:
    """A sentence of ours, in which `code` stays code and everything else is plain."""
    parts = text.split("`")
    code = [f"`{part}`" if index % 2 else plain(part) if part.strip() else part for index, part in enumerate(parts)]
    return re.sub(" {2,}", " ", "".join(_spaced(code, parts)))


def _spaced(shown: Sequence[str], parts: Sequence[str]) -> Iterator[str]:
    """Put back the spaces around parts, which `plain` takes away."""
    for index, (text, part) in enumerate(zip(shown, parts, strict=True)):
        around = (" " * part[:1].isspace(), " " * part[-1:].isspace()) if not index % 2 and part.strip() else ("", "")
        yield f"{around[0]}{text}{around[1]}"


def scored(value: float | None, error: float | None, bound: bool) -> str:
    """A score with its standard error."""
    if value is None:
        return "–"
    shown = with_error(value, error)
    return shown.replace("± ", "± ≤") if bound else shown


def score_lines(scores: Sequence[Score] | str) -> list[str]:
    """A table of scores before and after training, or why there is none."""
    if isinstance(scores, str):
        return [prose(scores)]
    lines = ["| task | metric | rows | before | after | change |", "|---|---|--:|--:|--:|--:|"]
    for one in scores:
        before, after = scored(one.before, one.errors[0], one.bound), scored(one.after, one.errors[1], one.bound)
        change = "–"
        if one.before is not None and one.after is not None:
            change = with_error(one.after - one.before, one.change_error, "+")
        names = f"{plain(one.task)} | {plain(one.metric.replace('_', ' '))}"
        lines.append(f"| {names} | {one.rows} | {before} | {after} | {change} |")
    return [
        *lines,
        "",
        "± is a standard error over rows, of a change paired on them; ≤ marks one that is at most that.",
    ]


def sentence(found: Loads | Usage | Affinity | Cosines) -> str:
    """The most important of a finding, in words."""
    if isinstance(found, Loads):
        dead, whole = dead_experts(found)
        are = "is" if dead == 1 else "are"
        return (
            f"{dead} of {whole} routed experts {are} dead: below a tenth of an even share, on {plain(found.origin)}."
        )
    if isinstance(found, Usage):
        return f"A token uses {found.mean:.2f} routed experts on average, over linears and {found.tokens:,} tokens."
    if isinstance(found, Affinity):
        best = max(range(len(found.bits)), key=lambda index: found.bits[index])
        mean = sum(found.bits) / len(found.bits)
        return (
            f"The expert tells {mean:.3f} bits about which of {len(found.tasks)} tasks it is, a mean over linears; "
            f"most in `{found.modules[best]}`, {found.bits[best]:.3f} bits."
        )
    return (
        f"Pairs of experts with a cosine above {ALIKE_ABOVE:g}: {len(found.pairs)}. "
        f"Experts that add nothing: {len(found.empty)}."
    )


def dead_experts(loads: Loads) -> tuple[int, int]:
    """Experts with less than a tenth of an even share at the end, and all."""
    rows = [row for row in loads.end if row]
    return sum(value < DEAD_BELOW / len(row) for row in rows for value in row), sum(map(len, rows))


def _account(account: Account) -> list[str]:
    lines = [f"- {plain(kind)}: {number:,}" for kind, number in account.parameters.items()]
    lines.append(f"- on disk: {size(account.bytes['all'])}")
    lines += [f"- {plain(name)}: {plain(value)}" for name, value in account.serving.items()]
    if account.refused:
        lines.append(f"- on servers: {plain(account.refused)}")
    return lines
