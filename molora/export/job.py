"""From an adapter's folder to what servers load: one function for every target, with a report of what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from molora.errors import MergeError
from molora.export.options import ExportOptions
from molora.export.parts import write_experts, write_tasks
from molora.export.quality import compare, distilled, write_candidate
from molora.export.report import ExportReport
from molora.export.source import ADAPTER, Rows, Source, load_source, only_task, read_rows_for
from molora.export.targets import check_target, what_servers_refuse, write_target
from molora.plain.calibrate import Calibration, calibrate
from molora.plain.fit import relative_error, truncate_unweighted
from molora.plain.fixed import Fixed, fixed_factors
from molora.plain.lora import PlainLora
from molora.writing import check_place, scratch_folder


def export_adapter(directory: str | Path, out: str | Path, **options: Any) -> ExportReport:
    """Write an adapter in a form that needs no molora.

    Exact where the mixing weights are fixed, by themselves or by what is given; otherwise the nearest plain LoRA, if
    calibration was asked for. Nothing is overwritten, and `out` is there in the end or not at all.

    Args:
        directory: Folder of the adapter.
        out: New folder.
        **options: See `ExportOptions`.

    Returns:
        What was written, and how good it is.

    Raises:
        MergeError: If no exact form exists and calibration was not asked for.
        ConfigError: If the options contradict each other or the adapter.
        DataError: If calibration rows cannot be read.
        WriteError: If `out` cannot be written.
    """
    chosen = ExportOptions(**options)
    check_place(out)
    # `dtype` is that of a merged model, which is summed up in fp32 whatever it is loaded in.
    loading = None if chosen.target == "dense" else chosen.dtype
    source = load_source(str(directory), base_model=chosen.base_model, dtype=loading, dequantize=chosen.dequantize)
    check_target(source, chosen)
    report = ExportReport(str(directory), source.base_model, chosen.target, "exact", _fixed_by(chosen))
    if chosen.target == "experts":
        write_experts(source, out, chosen, report)
    elif chosen.target == "tasks":
        write_tasks(source, out, chosen, report)
    else:
        _write_one(source, out, chosen, report)
    return report


def _write_one(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    rows = None
    if options.calibrate is not None:
        rows = read_rows_for(source, options.calibrate, options.score, options.rows, options.seed)
    with scratch_folder(out) as scratch:
        exact = _exact(source, options, report, refuse=rows is None)
        if exact is not None:
            loras = {report.method: exact}
            rows = _rows_of_exact(rows, options, report)
        else:
            assert rows is not None
            report.method = options.chosen_method
            loras, report.calibration = _fitted(source, options, rows, scratch)
            report.notes += _notes_on_fit(source)
        if rows is not None or options.target == "lora":
            for name, lora in loras.items():
                write_candidate(source, lora, scratch / name)
        if rows is not None:
            report.data = rows.origin
            folders = {name: scratch / name for name in loras}
            report.quality = compare(source, folders, rows.parts["judge"], options, rows.scored)
            if (found := report.calibration) is not None:
                for method in found.loras:
                    report.quality[method].output_error = found.mean_error(method)
        lora = loras[report.method]
        report.rank = lora.rank
        report.notes += what_servers_refuse(source, lora) if options.target == "lora" else []
        write_target(source, lora, scratch / report.method, out, options, report)


def _fitted(
    source: Source, options: ExportOptions, rows: Rows, scratch: Path
) -> tuple[dict[str, PlainLora], Calibration]:
    """The plain LoRAs near to the adapter, by method."""
    found = calibrate(
        source.model, rows.parts, ADAPTER, rank=options.rank, bias=options.bias, joint=options.joint, progress=True
    )
    loras = dict(found.loras)
    if options.method == "distilled":
        start = loras["calibrated"]
        write_candidate(source, start, scratch / "start")
        loras["distilled"] = distilled(source, scratch / "start", start, rows.fitted, options)
    else:
        found.by_method(options.chosen_method)  # refuses one that there is none of
    return loras, found


def _exact(source: Source, options: ExportOptions, report: ExportReport, refuse: bool) -> PlainLora | None:
    """The plain LoRA that the adapter is, cut to the wanted rank; `None` if it is none and that may be."""
    prompt = None if options.prompt is None else _prompt_ids(source, options.prompt)
    try:
        factors = fixed_factors(source.model, ADAPTER, Fixed(options.task, options.expert_scores, prompt))
    except MergeError:
        if refuse:
            raise
        return None
    whole = PlainLora(factors, {}, source.config.fan_in_fan_out)
    if options.rank is None or options.rank >= whole.rank:
        return whole
    cut = {name: truncate_unweighted(down, up, options.rank) for name, (down, up) in factors.items()}
    errors = [relative_error(*cut[name], *factors[name]) for name in factors]
    report.method = "cut"
    report.notes.append(
        f"The adapter is exactly a LoRA of rank {whole.rank}. Cut to rank {options.rank} by an SVD of the weights, it "
        f"loses {sum(errors) / len(errors):.1%} of a linear's mean squared weight, {max(errors):.1%} in the worst."
    )
    return replace(whole, factors=cut)


def _rows_of_exact(rows: Rows | None, options: ExportOptions, report: ExportReport) -> Rows | None:
    """Rows that an exact form can be compared on: those of its task; none for one prompt or one choice of scores."""
    if rows is None:
        return None
    if options.prompt is not None or options.expert_scores is not None:
        report.notes.append("It holds for what it was fixed by, and was not compared on other rows.")
        return None
    report.notes.append("An exact form exists, so calibration rows were only used to measure it.")
    return rows if options.task is None else only_task(rows, options.task)


def _notes_on_fit(source: Source) -> list[str]:
    if source.config.expert_scope != "ffn":
        return []
    return [
        "The experts span whole feed-forward blocks. The output error is that of each linear by itself; what is lost "
        "between the linears of a block shows in the divergence and the scores only."
    ]


def _prompt_ids(source: Source, text: str) -> torch.Tensor:
    if source.tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        encoded: Any = source.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = source.tokenizer(text, return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"][0]
    return ids


def _fixed_by(options: ExportOptions) -> dict[str, Any]:
    given: Mapping[str, Any] = {"task": options.task, "scores": options.expert_scores, "prompt": options.prompt}
    return {name: value for name, value in given.items() if value is not None}
