"""`molora inspect`: what an adapter folder holds and how it was trained, in short, without loading its base model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from torch import Tensor

from molora.commands.needs import reads_scores, reads_tasks, scores_per_row
from molora.config import MoLoraConfig
from molora.evaluation import score_table
from molora.parameters import count_by_kind, module_kind
from molora.plan import routing_spec
from molora.report import TaskRouting, routing_table
from molora.reports.folder import Folder, listed, read_folder
from molora.reports.short import in_short
from molora.reports.training import task_scores
from molora.routing import reads


def run(directory: str) -> int:
    """Print method, targets, parameters by kind and, if the run left a report, scores and routing.

    Raises:
        ConfigError: If the folder holds no molora adapter.
    """
    folder = read_folder(directory)
    config, tensors = folder.adapter.config, folder.adapter.tensors
    console = Console()
    console.print(_summary(config, folder.tasks, _is_calibrated(tensors)))
    console.print(_by_module(list(tensors)))
    parameters = Table("parameters", "number", title="Parameters by kind", title_justify="left")
    # The indices of shards are tensors, but no parameters.
    counts = count_by_kind((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    for kind, number in counts.items():
        parameters.add_row(kind, f"{number:,}")
    parameters.add_row("all", f"{sum(counts.values()):,}", style="bold")
    console.print(parameters)
    console.print("\nIn short")
    for line in in_short(folder):
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    _print_report(console, folder)
    console.print(f"\n`molora report {directory} OUT` draws curves, loads, affinities and tokens.", markup=False)
    return 0


def _summary(config: MoLoraConfig, tasks: list[str], calibrated: bool) -> Table:
    spec = routing_spec(config)
    limit = {
        "top_k": f" (k = {spec.top_k})",
        "top_p": f" (p = {spec.top_p:g})",
        "threshold": f" (at least {spec.threshold:g})",
        "adaptive_threshold": f" (learned, up to {spec.max_threshold:g})",
    }.get(spec.selection, "")
    table = Table(show_header=False, title="Adapter", title_justify="left")
    for name, value in {
        "base model": config.base_model_name_or_path or "not named",
        "experts": _experts(config),
        "shared experts": f"{config.shared_experts}, weight {config.shared_weight}" if config.shared_experts else "",
        "null experts": str(config.null_experts or ""),
        "frozen experts": f"the first {config.frozen_experts}" if config.frozen_experts else "",
        "layout": config.expert_layout if config.expert_layout != "separate" else "",
        "scope": _SCOPES[config.expert_scope, config.adapter_position],
        "router": _router(config, calibrated),
        "needs": _needs(config, tasks),
        "gate": f"{spec.gate}, temperature {spec.temperature:g}",
        "selection": spec.selection + limit,
        "weights": spec.weights + (", renormalised" if spec.renormalize else ""),
        "can be merged": _merging(config),
        "format": str(config.format_version),
    }.items():
        if value:
            table.add_row(name, value)
    return table


_SCOPES = {
    ("linear", "parallel"): "",
    ("linear", "after"): "linears; experts read their output",
    ("ffn", "parallel"): "an expert spans a feed-forward block; other linears have a plain LoRA",
    ("block", "parallel"): "blocks; experts stand beside them",
    ("block", "after"): "blocks; experts read their output",
}
"""By scope and position; nothing is said of what is usual."""


def _experts(config: MoLoraConfig) -> str:
    number = config.num_experts
    many = str(number) if isinstance(number, int) else f"{', '.join(map(str, number))} with depth,"
    if config.expert_layout == "pairs" and isinstance(config.r, list):
        size = f"from {config.r[0]} rows of A and {config.r[1]} columns of B"
    else:
        size = f"of rank {config.r if isinstance(config.r, int) else ', '.join(map(str, config.r))}"
    size += f", alpha {config.lora_alpha:g}"
    if not config.imported_experts:
        return f"{many} {size}"
    names = ", ".join(f"{expert['name']} (rank {expert['r']})" for expert in config.imported_experts)
    total = sum([number] if isinstance(number, int) else number) + config.shared_experts
    further = total - len(config.imported_experts)
    return f"{len(config.imported_experts)} imported: {names}" + (f"; {further} new {size}" if further > 0 else "")


def _is_calibrated(tensors: Mapping[str, Tensor]) -> bool:
    """Whether routers know the mean of what they read, or need none."""
    means = [value for name, value in tensors.items() if name.endswith(".input_mean")]
    return not means or any(bool(value.any()) for value in means)


def _router(config: MoLoraConfig, calibrated: bool) -> str:
    norm = {"center": "centred", "standardize": "standardised"}.get(config.router_norm, "")
    notes = {
        f"input {norm}": bool(norm) and calibrated,
        f"input to be {norm}, not calibrated yet": bool(norm) and not calibrated,
        "one decision a sequence": config.router_level == "sequence",
        "reads the base model's features": config.router_input == "base",
        f"sharing: {config.router_sharing}": config.router_sharing != "none",
        "frozen": config.freeze_router,
    }
    return ", ".join([config.router, *(note for note, holds in notes.items() if holds)])


def _needs(config: MoLoraConfig, tasks: list[str]) -> str:
    """What must be given in a call."""
    needs = []
    if reads_tasks(config):
        names = ": " + ", ".join(f"{index} {name}" for index, name in enumerate(tasks)) if tasks else ""
        needs.append(f"the id of a task, of {config.num_tasks}{names}")
    if reads_scores(config):
        needs.append(f"expert_scores, {' or '.join(map(str, scores_per_row(config)))} a row")
    return "; ".join(needs)


def _merging(config: MoLoraConfig) -> str:
    inputs = reads(config.router)
    if inputs & {"input", "hidden", "state"}:
        return f"no, it routes every {config.router_level} by itself"
    if inputs:
        return "no, its weights depend on what is given"
    if config.expert_scope == "block" or config.has_nonlinear_experts:
        return "no, its experts are no part of a linear"
    return "no, it routes every token by itself" if config.is_routed else "yes, exactly"


def _by_module(names: list[str]) -> Table:
    layers = defaultdict(set)
    for name in names:
        match = re.match(r"(base_model\.model\..*)\.molora_(frozen_)?A\.", name)
        if match:
            layers[module_kind(match[1])].add(match[1])
    table = Table("module", "adapted", title="Where", title_justify="left")
    for ending, found in sorted(layers.items()):
        table.add_row(ending, str(len(found)))
    return table


def _print_report(console: Console, folder: Folder) -> None:
    if after := task_scores(folder, "after"):
        console.print("\nScores on held-out rows")
        console.print(score_table(task_scores(folder, "before"), after))
    if routing := listed(folder.record, "routing"):
        console.print("\nHow each task is routed, averaged over linears")
        console.print(routing_table([TaskRouting(**task) for task in routing]))
