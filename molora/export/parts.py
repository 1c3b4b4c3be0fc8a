"""Write a mixture in parts: one plain LoRA for each expert, or for each task."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from molora.errors import ConfigError, Problem
from molora.export.experts import expert_loras, gate_tensors
from molora.export.options import ExportOptions
from molora.export.quality import compare, write_candidate
from molora.export.report import ExportReport
from molora.export.source import ADAPTER, Rows, Source, parts_of_task, read_rows_for
from molora.export.targets import other_bytes, write_report
from molora.folders import CONFIG_FILE
from molora.merging import cannot_merge
from molora.plain.calibrate import calibrate
from molora.plain.fit import truncate_unweighted
from molora.plain.fixed import Fixed, fixed_factors
from molora.plain.lora import PlainLora, folder_bytes
from molora.plan import routing_reads
from molora.writing import new_folder, scratch_folder

GATE_FILE = "molora_gate.safetensors"
"""What experts alone lack, beside their folders, with the adapter's config."""


def write_experts(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    """Write each expert, or group of experts, as a plain LoRA, and the gate beside them."""
    parts = list(expert_loras(source.model, ADAPTER, options.group_size))
    report.rank = max(part.lora.rank for part in parts)
    report.notes.append(
        f"The experts are exact; the gate between them is not part of a LoRA and lies in {GATE_FILE}, beside the "
        "config that says how it is used. `molora compose` mixes the folders again."
    )
    with new_folder(out, needs=sum(folder_bytes(part.lora) + other_bytes(source) for part in parts)) as folder:
        for part in parts:
            write_candidate(source, part.lora, folder / part.name)
        gates = gate_tensors(source.model, ADAPTER)
        if gates:
            save_file(gates, folder / GATE_FILE, metadata={"format": "pt"})
            shutil.copy(Path(source.directory) / CONFIG_FILE, folder / f"molora_{CONFIG_FILE}")
        write_report(folder, report)


def write_tasks(source: Source, out: str | Path, options: ExportOptions, report: ExportReport) -> None:
    """Write a plain LoRA for each task: exact where tasks alone decide, else fitted to the rows of the task."""
    reads = routing_reads(source.config)
    if reads == {"task"} and not source.config.has_nonlinear_experts:
        if options.calibrate is not None:
            message = "tasks alone decide, so every LoRA is exact and there is nothing to fit; leave it out."
            raise ConfigError([Problem("--calibrate", message)], "cannot export like this")
        loras = _exact_tasks(source, options, report)
    elif options.calibrate is None:
        if not reads:
            message = "this adapter is the same for every task; use `--as lora`."
            raise ConfigError([Problem("--as", message)], "cannot export like this")
        raise cannot_merge(ADAPTER, reads, is_linear=not source.config.has_nonlinear_experts)
    else:
        rows = read_rows_for(source, options.calibrate, options.score, options.rows, options.seed)
        report.method, report.data = options.chosen_method, rows.origin
        with scratch_folder(out) as scratch:
            loras = {task: _fit_task(source, task, rows, options, report, scratch / "lora") for task in rows.by_task}
    report.rank = max(lora.rank for lora in loras.values())
    needs = sum(folder_bytes(lora) + other_bytes(source) for lora in loras.values())
    with new_folder(out, needs=needs) as folder:
        for name, lora in zip(folder_names(list(loras)), loras.values(), strict=True):
            (folder / name).mkdir()
            write_candidate(source, lora, folder / name)
        write_report(folder, report)


def folder_names(tasks: Sequence[str]) -> list[str]:
    """A folder's name for each task: its own, as far as letters, digits, dots and dashes go, and never another's."""
    names: list[str] = []
    for index, task in enumerate(tasks):
        name = re.sub(r"[^\w.-]+", "_", task).strip(".") or f"task_{index}"
        while name in names:
            name = f"{name}_{index}"
        names.append(name)
    return names


def _exact_tasks(source: Source, options: ExportOptions, report: ExportReport) -> dict[str, PlainLora]:
    known, found = source.known_tasks(), {}
    for task in range(source.config.num_tasks or 1):
        name = known[task] if task < len(known) and known.count(known[task]) == 1 else f"task_{task}"
        factors = fixed_factors(source.model, ADAPTER, Fixed(task=task))
        if options.rank is not None:
            if any(options.rank < len(down) for down, _ in factors.values()):
                report.method = "cut"
            factors = {key: truncate_unweighted(down, up, options.rank) for key, (down, up) in factors.items()}
        found[name] = PlainLora(factors, {}, source.config.fan_in_fan_out)
    return found


def _fit_task(
    source: Source, task: str, rows: Rows, options: ExportOptions, report: ExportReport, folder: Path
) -> PlainLora:
    parts = parts_of_task(source, rows, task)
    found = calibrate(
        source.model, parts, ADAPTER, rank=options.rank, bias=options.bias, joint=options.joint, progress=True
    )
    lora = found.by_method(options.chosen_method)
    write_candidate(source, lora, folder)
    quality = compare(source, {task: folder}, parts["judge"], options, [])
    quality[task].output_error = found.mean_error(options.chosen_method)
    report.quality |= {f"{task}: {form}": one for form, one in quality.items() if form != task}
    report.quality[task] = quality[task]
    shutil.rmtree(folder)
    return lora
