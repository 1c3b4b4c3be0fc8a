"""The text of a model card: what was trained, on what, how it is routed, what it scores, how to load it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from molora.card.loading import how_to_load
from molora.card.method import described
from molora.card.place import version_lines
from molora.card.source import Source
from molora.parameters import count_by_kind
from molora.reports.about import about, formula, versions
from molora.reports.folder import listed
from molora.reports.summary import dead_experts, plain, score_lines
from molora.reports.training import loads_of
from molora.shown import last_part
from molora.slim.report import SLIM_FILE

_OWN_ROWS = ("base model", "method", "trained on", "state")
"""Facts of a report that a card says in words of its own."""

_ROUTING = {
    "experts a token": "experts_per_token",
    "largest load": "load_max",
    "dead experts": "dead_experts",
    "threshold": "threshold_mean",
}


def title_of(source: Source) -> str:
    """Heading of a new card."""
    return f"A mixture of LoRA experts on {last_part(source.base_shown)}"


def card_text(source: Source, license_name: str | None) -> str:
    """Our part of a card.

    Args:
        source: What it is written from.
        license_name: The adapter's licence, if one is named.
    """
    sections = {
        "": _method(source),
        "Training": _training(source),
        "Data": _data(source),
        "Results": _results(source),
        "Routing": _routing(source),
        "How to load it": how_to_load(source),
        "Licence": [_license(license_name)],
        "The run": _run_file(source),
    }
    lines: list[str] = []
    for heading, found in sections.items():
        lines += ([f"## {heading}", ""] if heading and found else []) + ([*found, ""] if found else [])
    shown = {name: version for name, version in versions(source.config).items() if name != "peft"}
    shown.pop("peft that saved the adapter", None)
    return "\n".join([*lines, *version_lines(shown)])


def _method(source: Source) -> list[str]:
    base = f"[{source.base}](https://huggingface.co/{source.base})" if source.base else plain(source.base_shown)
    kind = "a checkpoint of a training of" if source.folder.is_checkpoint else "an adapter,"
    lines = [
        f"This is {kind} a mixture of LoRA experts {_on(base)} Every adapted linear computes",
        *("", "```", formula(source.config), "```", ""),
        "with W₀ the frozen weight, Aₑ and Bₑ the two matrices of expert e, sₑ its scale, and wₑ its weight"
        + (", which the router gives" if source.config.is_routed else "")
        + (" but to shared experts." if source.config.is_routed and source.config.shared_experts else "."),
    ]
    if source.preset:
        words, paper = described(source.preset)
        lines += ["", f"The method is `{source.preset}`. {words}"]
        lines += ["", f"Paper: [arXiv {paper}](https://arxiv.org/abs/{paper})."] * bool(paper)
    facts = {name: value for name, value in about(source.folder).items() if name not in _OWN_ROWS}
    lines += ["", *(f"- **{plain(name)}**: {plain(value)}" for name, value in facts.items())]
    lines += [f"- **{plain(kind)}**: {number:,}" for kind, number in _parameters(source).items()]
    names = [str(one["name"]) for one in source.config.imported_experts or [] if one.get("name")]
    lines += [f"- **experts come from**: {', '.join(plain(last_part(name)) for name in names)}"] * bool(names)
    return lines


def is_of_a_folder(text: str, source: Source) -> bool:
    """Whether a card says that the base model, as it is called now, is none of the hub.

    A relative folder looks like an id wherever the folder is not.
    """
    return _on(plain(source.base_shown)) in text


def _on(base: str) -> str:
    return f"on {base}, made with molora."


def _parameters(source: Source) -> dict[str, int]:
    tensors = ((name, value) for name, value in source.folder.adapter.tensors.items() if value.is_floating_point())
    counts = count_by_kind(tensors)
    return {f"parameters, {kind}": number for kind, number in counts.items()}


def _training(source: Source) -> list[str]:
    facts, state = source.training, source.folder.state
    lines = []
    trained, whole = facts.get("trained"), facts.get("parameters")
    if trained and whole:
        lines.append(f"{trained:,} of {whole:,} parameters were trained ({trained / whole:.2%}).")
    step = state.get("global_step")
    if facts and isinstance(step, int) and step:
        epochs = f", {state['epoch']:.3g} epochs" if isinstance(state.get("epoch"), float) else ""
        lines.append(
            f"Trained with {plain(str(facts['trainer']))} for {step:,} step{'s' * (step > 1)}{epochs}, in batches of "
            f"{facts['batch_rows']}, learning rate {facts['learning_rate']:g}."
        )
    if facts.get("paper"):
        lines.append(f"The trainer's paper: [arXiv {facts['paper']}](https://arxiv.org/abs/{facts['paper']}).")
    losses = source.config.routing_losses
    if lines and losses:
        lines.append(f"Losses on the routing: {', '.join(f'`{name}`' for name in sorted(losses))}.")
    return [" ".join(lines)] if lines else []


def _data(source: Source) -> list[str]:
    counts = [int(number) for number in source.training.get("rows_of_tasks") or []]
    rows = source.training.get("rows")
    lines = []
    if sum(counts):
        cells = [
            [source.task_name(index), f"{number:,}", f"{number / sum(counts):.1%}"]
            for index, number in enumerate(counts)
            if number
        ]
        lines += _table(["task", "rows an epoch", "share"], cells)
    elif rows:
        lines.append(f"{rows:,} rows an epoch.")
    elif source.folder.tasks:
        lines.append(f"Trained on {', '.join(plain(name) for name in source.folder.tasks)}.")
    if source.datasets:
        cells = [
            [_dataset(entry), _task_of(entry), _shown(entry.get("weight")), _shown(entry.get("max_samples"), "all")]
            for entry in source.datasets
        ]
        lines += [""] * bool(lines) + _table(["dataset", "task", "weight", "rows, at most"], cells)
        lines += ["", "A weight says how often an epoch goes through the rows."]
    return lines


def _dataset(entry: dict[str, Any]) -> str:
    return ", ".join(str(part) for part in (entry.get("path"), entry.get("name"), entry.get("split")) if part)


def _task_of(entry: dict[str, Any]) -> str:
    return str(entry.get("task") or "")


def _shown(value: Any, without: str = "") -> str:
    return f"{value:g}" if isinstance(value, int | float) else without


def _results(source: Source) -> list[str]:
    if not source.scores:
        return []
    return ["Scores on rows that were not trained on, before training and after it:", "", *score_lines(source.scores)]


def _routing(source: Source) -> list[str]:
    if not source.config.is_routed:
        return []
    lines = []
    loads = loads_of(source.folder, None, "")
    if not isinstance(loads, str):
        dead, whole = dead_experts(loads)
        rows = [row for row in loads.end if row]
        most = max((max(row) for row in rows), default=0.0)
        lines.append(
            f"Dead routed experts, with less than a tenth of an even share in {loads.origin}: {dead:,} of {whole:,}. "
            f"The largest share that one expert of a linear gets is {most:.1%}."
        )
        used = _experts_used(source)
        lines += [f"A token uses {used:.2f} routed experts, a mean over linears."] * (used is not None)
        lines = [" ".join(lines)]
    tasks = [one for one in listed(source.folder.record, "routing") if isinstance(one, dict) and one.get("metrics")]
    if tasks:
        cells = [_routing_row(one) for one in tasks]
        lines += [""] * bool(lines) + ["On held-out rows, averaged over linears:", ""]
        lines += _table(["task", "tokens", *_ROUTING, "distance"], cells)
        lines += [
            "",
            "The distance of a task is how far its load of experts is from that of all tasks: 0 is the same, 1 is "
            "none in common.",
        ]
    return lines


def _experts_used(source: Source) -> float | None:
    _, entries = source.folder.history
    values = [one for one in (entries[-1].get("experts_per_token") or [] if entries else []) if one is not None]
    return sum(values) / len(values) if values else None


def _routing_row(entry: dict[str, Any]) -> list[str]:
    values = [entry["metrics"].get(name) for name in _ROUTING.values()]
    numbers = ["–" if value is None else f"{value:.3f}" for value in (*values, entry.get("distance"))]
    return [str(entry.get("task", "")), f"{entry.get('tokens', 0):,}", *numbers]


def _license(name: str | None) -> str:
    own = f"The adapter's licence is `{plain(name)}`." if name else "No licence is named for the adapter."
    return f"{own} The base model and the data have licences of their own, which hold for what is made of them."


def _run_file(source: Source) -> list[str]:
    if not source.run:
        return []
    text = yaml.safe_dump(source.run, sort_keys=False, allow_unicode=True).strip()
    what = "The run file; with its paths filled in, molora train trains this adapter again"
    if (source.folder.path / SLIM_FILE).is_file():
        what = "The run file of the adapter that this one was made from"
    return [
        *("<details>", f"<summary>{what}</summary>", ""),
        *("````yaml", text, "````", "", "</details>", ""),
        "Of paths only the last part is shown; fill in the rest.",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first two columns hold text, and the others numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" * min(2, len(header)) + "|--:" * (len(header) - 2) + "|"]
    return [*lines, *("| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows)]


def datasets_on_hub(source: Source) -> list[str]:
    """Ids on the hub of what was trained on."""
    return [name for name, _ in source.dataset_ids if name]


def scored_on(source: Source) -> dict[str, str]:
    """Ids on the hub of what tasks were scored on, by task."""
    of_rows = zip(source.datasets, source.dataset_ids, strict=True)
    return {_task_of(entry): name for entry, (_, name) in of_rows if name and _task_of(entry)}
