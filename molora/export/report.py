"""What an export costs, as a table, as JSON beside the files, and in the model card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from molora._version import __version__
from molora.card.front import merged
from molora.card.place import with_front
from molora.evaluation import HEADLINES, TaskScore
from molora.evaluation.record import as_entries
from molora.plain.calibrate import CURVE, Calibration
from molora.shown import hub_id, last_part

_TITLES = {
    "lora": "A plain LoRA",
    "experts": "Experts as plain LoRAs",
    "tasks": "Tasks as plain LoRAs",
    "dense": "A merged model",
    "gguf-lora": "A LoRA for llama.cpp",
    "gguf": "A merged model for llama.cpp",
}

EXPORT_FILE = "molora_export.json"
"""Written into every exported folder."""


@dataclass
class Quality:
    """How good one form of the model is.

    Attributes:
        kl: Mean KL divergence from the routed model on held-out rows, nats a token; `None` for the routed model.
        perplexity: Of the answers on held-out rows.
        output_error: Mean over linears of the relative squared error of what the adapter adds; `None` where that says
            nothing.
        scores: Of every task, by `molora.evaluation`.
    """

    kl: float | None = None
    perplexity: float | None = None
    output_error: float | None = None
    scores: list[TaskScore] = field(default_factory=list)

    def score(self) -> float | None:
        """Mean over tasks of the mean of their accuracy, exact match and token F1; `None` without any."""
        by_task: dict[str, list[float]] = {}
        for one in self.scores:
            if one.metric in HEADLINES:
                by_task.setdefault(one.task, []).append(one.value)
        means = [sum(values) / len(values) for values in by_task.values()]
        return sum(means) / len(means) if means else None


@dataclass
class ExportReport:
    """Everything known about an export.

    Attributes:
        source: The adapter's folder.
        base_model: Its base model.
        target: What was written: `lora`, `experts`, `tasks`, `dense`, `gguf-lora`, `gguf`.
        method: `exact`, `cut` for an exact one brought down to a lower rank, or how the nearest one was found.
        fixed_by: What fixed the mixing weights, if they read something.
        rank: Rank of the LoRA, or of the largest.
        data: Where the calibration rows come from.
        calibration: Errors of every linear; `None` for an exact export.
        quality: By form: `base`, `routed`, and the plain LoRAs that were tried, each read back from a folder by PEFT.
        notes: What a user should know.
    """

    source: str
    base_model: str
    target: str
    method: str
    fixed_by: dict[str, Any] = field(default_factory=dict)
    rank: int | None = None
    data: str | None = None
    calibration: Calibration | None = None
    quality: dict[str, Quality] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def kept(self, name: str) -> float | None:
        """The share of the routed adapter's mean task gain that a form keeps; `None` if it is not known."""
        scores = [self.quality[form].score() if form in self.quality else None for form in ("base", "routed", name)]
        base, routed, own = scores
        if base is None or routed is None or own is None or routed == base:
            return None
        return (own - base) / (routed - base)

    def as_json(self) -> dict[str, Any]:
        """Plain values for the file."""
        found = self.calibration
        return {
            "molora": __version__,
            **{name: getattr(self, name) for name in ("source", "base_model", "target", "method", "fixed_by", "rank")},
            "data": self.data,
            "calibration_tokens": found.tokens if found else None,
            "quality": {
                name: {
                    **asdict(replace(one, scores=[])),
                    "scores": as_entries(one.scores),
                    "score": one.score(),
                    "gain_kept": self.kept(name),
                }
                for name, one in self.quality.items()
            },
            "linears": [asdict(fit) for fit in found.linears] if found else [],
            "notes": self.notes,
        }


def quality_table(report: ExportReport) -> Table:
    """One line a form of the model."""
    table = Table("model", *(["output error"] if report.calibration else []))
    for name in ("KL to routed", "perplexity", "task score", "gain kept"):
        table.add_column(name, justify="right")
    for name, one in report.quality.items():
        kept = report.kept(name)
        cells = [_number(one.output_error, ".3f")] if report.calibration else []
        cells += [_number(one.kl, ".4f"), _number(one.perplexity, ".3f"), _number(one.score(), ".3f")]
        table.add_row(name, *cells, "-" if kept is None else f"{kept:.0%}")
    return table


def energy_table(calibration: Calibration) -> Table:
    """How much of the fitted map lower ranks would keep, over all linears that were fitted."""
    fitted = [fit for fit in calibration.linears if fit.energy]
    table = Table("rank", "of the fitted map's mean squared output", "in the worst linear")
    for rank in CURVE:
        values = [fit.energy[rank] for fit in fitted if rank in fit.energy]
        if values and len(values) == len(fitted):
            table.add_row(str(rank), f"{sum(values) / len(values):.1%}", f"{min(values):.1%}")
    return table


def model_card(report: ExportReport, tags: Sequence[str], how_to_load: str) -> str:
    """The text of `README.md` in the exported folder."""
    base = hub_id(report.base_model)
    library = "transformers" if report.target == "dense" else "peft"
    lines = [
        f"# {_TITLES[report.target]} from a mixture of LoRA experts",
        "",
        f"Made by molora {__version__} from an adapter of {base or last_part(report.base_model)}, {report.method}."
        + (f" Rank {report.rank}." if report.rank else ""),
        *(
            ["", "Fixed by " + ", ".join(f"{k} = {v}" for k, v in report.fixed_by.items()) + "."]
            * bool(report.fixed_by)
        ),
        "",
        how_to_load,
    ]
    if report.quality:
        lines += ["", "## What the export costs", "", *_markdown(report)]
    if report.data:
        lines += ["", f"Calibrated with rows of {report.data}; measured on rows that nothing was fitted to."]
    for note in report.notes:
        lines += ["", note]
    return with_front(merged({}, {"library_name": library}, tags, base), "\n".join(lines))


def _markdown(report: ExportReport) -> list[str]:
    tasks = list(dict.fromkeys((s.task, s.metric) for one in report.quality.values() for s in one.scores))
    header = ["model", "output error", "KL to routed", "perplexity", *(f"{task} {metric}" for task, metric in tasks)]
    lines = ["| " + " | ".join([*header, "gain kept"]) + " |", "|" + "---|" * (len(header) + 1)]
    for name, one in report.quality.items():
        by_task = {(s.task, s.metric): s.value for s in one.scores}
        kept = report.kept(name)
        cells = [name, _number(one.output_error, ".3f"), _number(one.kl, ".4f"), _number(one.perplexity, ".3f")]
        cells += [_number(by_task.get(key), ".3f") for key in tasks]
        lines.append("| " + " | ".join([*cells, "-" if kept is None else f"{kept:.0%}"]) + " |")
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
