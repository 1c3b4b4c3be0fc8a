"""From an adapter's folder to what servers load: one function for every target, with a report of what it costs."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from molora.errors import MergeError, MoloraError
from molora.export.calibrate import Calibration, calibrate
from molora.export.experts import expert_loras, gate_tensors
from molora.export.fit import truncate_unweighted
from molora.export.fixed import Fixed, fixed_factors
from molora.export.options import ExportOptions
from molora.export.plain import PlainLora, folder_bytes
from molora.export.quality import compare, distilled, write_candidate
from molora.export.report import ExportReport, Quality
from molora.export.source import ADAPTER, Rows, Source, load_source, parts_of_task, read_rows_for
from molora.export.targets import what_servers_refuse, write_report, write_target
from molora.folders import CONFIG_FILE
from molora.merging import cannot_merge
from molora.plan import routing_reads
from molora.writing import check_place, new_folder

GATE_FILE = "molora_gate.safetensors"
"""What experts alone lack, beside their folders, with the adapter's config."""


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
    report = ExportReport(str(directory), source.base_model, chosen.target, "exact", _fixed_by(chosen))
    if chosen.target == "experts":
        _write_experts(source, out, chosen, report)
    elif chosen.target == "tasks":
        _write_tasks(source, out, chosen, report)
    else:
        _write_one(source, out, chosen, report)
    return report


def _write_one(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(source, options)
        loras, calibration = _candidates(source, options, rows, Path(scratch))
        exact = "exact" in loras
        report.method = "exact" if exact else options.chosen_method
        report.calibration, report.data = calibration, rows.origin if rows is not None else None
        if exact and options.calibrate is not None:
            report.notes.append("An exact form exists, so the calibration rows were only used to measure it.")
        folders = {name: Path(scratch) / name for name in loras}
        judged = rows.parts["judge"] if rows is not None else []
        if rows is not None:
            report.quality = compare(source, folders, judged, options, rows.scored)
            _add_errors(report)
        lora = loras[report.method]
        report.rank = lora.rank
        report.notes += what_servers_refuse(source, lora) if options.target == "lora" else []
        write_target(source, lora, folders[report.method], out, options, report)


def _rows(source: Source, options: ExportOptions) -> Rows | None:
    if options.calibrate is None:
        return None
    return read_rows_for(source, options.calibrate, options.score, options.rows, options.seed)


def _candidates(
    source: Source, options: ExportOptions, rows: Rows | None, scratch: Path
) -> tuple[dict[str, PlainLora], Calibration | None]:
    """The plain LoRAs to choose from, written below `scratch`: the exact one alone, or those fitted to data."""
    calibration = None
    try:
        loras = {"exact": _exact(source, options)}
    except MergeError:
        if rows is None:
            raise
        calibration = calibrate(
            source.model,
            rows.parts,
            ADAPTER,
            rank=options.rank,
            bias=options.bias,
            joint=options.joint,
            progress=True,
        )
        loras = dict(calibration.loras)
    for name, lora in loras.items():
        write_candidate(source, lora, scratch / name)
    if calibration is not None and rows is not None and options.method == "distilled":
        start = loras["calibrated"]
        loras["distilled"] = distilled(source, scratch / "calibrated", start, rows.fitted, options)
        write_candidate(source, loras["distilled"], scratch / "distilled")
    if options.chosen_method not in loras and "exact" not in loras:
        raise MoloraError(
            f"`--method {options.chosen_method}` weighs linear experts, and those of this adapter are not linear; use "
            "`--method calibrated`."
        )
    return loras, calibration


def _exact(source: Source, options: ExportOptions) -> PlainLora:
    prompt = None
    if options.prompt is not None:
        prompt = _prompt_ids(source, options.prompt)
    factors = fixed_factors(source.model, ADAPTER, Fixed(options.task, options.expert_scores, prompt))
    if options.rank is not None:
        factors = {name: truncate_unweighted(down, up, options.rank) for name, (down, up) in factors.items()}
    return PlainLora(factors, {}, source.config.fan_in_fan_out)


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


def _add_errors(report: ExportReport) -> None:
    if report.calibration is None:
        return
    for method in report.calibration.loras:
        report.quality[method].output_error = report.calibration.mean_error(method)


def _write_experts(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    parts = list(expert_loras(source.model, ADAPTER, options.group_size))
    report.rank = max(part.lora.rank for part in parts)
    report.notes.append(
        f"The experts are exact; the gate between them is not part of a LoRA and lies in {GATE_FILE}, beside the "
        "config that says how it is used. `molora compose` mixes the folders again."
    )
    with new_folder(out, needs=sum(folder_bytes(part.lora) for part in parts)) as folder:
        for part in parts:
            write_candidate(source, part.lora, folder / part.name)
        gates = gate_tensors(source.model, ADAPTER)
        if gates:
            save_file(gates, folder / GATE_FILE, metadata={"format": "pt"})
            shutil.copy(Path(source.directory) / CONFIG_FILE, folder / f"molora_{CONFIG_FILE}")
        write_report(folder, report)


def _write_tasks(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    exact = routing_reads(source.config) == {"task"} and not source.config.has_nonlinear_experts
    rows = _rows(source, options)
    if not exact and rows is None:
        raise cannot_merge(ADAPTER, routing_reads(source.config))
    names = _task_names(source, rows, options)
    loras: dict[str, PlainLora] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task, name in enumerate(names):
            if exact:
                loras[name] = PlainLora(
                    fixed_factors(source.model, ADAPTER, Fixed(task=task)), {}, source.config.fan_in_fan_out
                )
                continue
            assert rows is not None
            parts = parts_of_task(source, rows, name)
            found = calibrate(
                source.model, parts, ADAPTER, rank=options.rank, bias=options.bias, joint=options.joint, progress=True
            )
            loras[name] = found.loras[options.chosen_method]
            write_candidate(source, loras[name], Path(scratch) / "lora")
            quality = compare(source, {name: Path(scratch) / "lora"}, parts["judge"], options, [])
            quality[name].output_error = found.mean_error(options.chosen_method)
            report.quality |= {f"{name}: {form}": one for form, one in quality.items() if form != name}
            report.quality[name] = quality[name]
            shutil.rmtree(Path(scratch) / "lora")
    report.method = "exact" if exact else options.chosen_method
    report.rank = max(lora.rank for lora in loras.values())
    with new_folder(out, needs=sum(map(folder_bytes, loras.values()))) as folder:
        for name, lora in loras.items():
            write_candidate(source, lora, folder / re.sub(r"[^\w.-]+", "_", name))
        write_report(folder, report)


def _task_names(source: Source, rows: Rows | None, options: ExportOptions) -> list[str]:
    """Names of the tasks by id; those with data, where LoRAs are fitted to it."""
    known = source.known_tasks()
    if rows is not None and routing_reads(source.config) != {"task"}:
        return list(rows.by_task)
    number = source.config.num_tasks or 1
    return [known[task] if task < len(known) else f"task_{task}" for task in range(number)]


def _fixed_by(options: ExportOptions) -> dict[str, Any]:
    given: Mapping[str, Any] = {"task": options.task, "scores": options.expert_scores, "prompt": options.prompt}
    return {name: value for name, value in given.items() if value is not None}


__all__ = ["GATE_FILE", "ExportOptions", "ExportReport", "Quality", "export_adapter"]
