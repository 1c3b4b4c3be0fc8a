"""`molora inspect`: what an adapter folder holds, without loading its base model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.commands.parameters import count_by_kind
from molora.config import MoLoraConfig
from molora.evaluation import TaskScore, score_table
from molora.plan import routing_spec
from molora.report import REPORT_FILE, TaskRouting, routing_table


def run(directory: str) -> int:
    """Print method, targets, parameters by kind and, if the run left a report, scores and routing.

    Raises:
        ConfigError: If the folder holds no molora adapter.
    """
    config = read_adapter_config(directory)
    tensors = read_adapter_tensors(directory)
    console = Console()
    console.print(_summary(config))
    console.print(_by_module(list(tensors)))
    parameters = Table("parameters", "number", title="Parameters by kind", title_justify="left")
    for kind, number in count_by_kind(tensors.items()).items():
        parameters.add_row(kind, f"{number:,}")
    parameters.add_row("all", f"{sum(tensor.numel() for tensor in tensors.values()):,}", style="bold")
    console.print(parameters)
    _print_report(console, Path(directory) / REPORT_FILE)
    return 0


def _summary(config: MoLoraConfig) -> Table:
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
        "experts": f"{config.num_experts} of rank {config.r}, alpha {config.lora_alpha:g}",
        "router": config.router,
        "gate": f"{spec.gate}, temperature {spec.temperature:g}",
        "selection": spec.selection + limit,
        "weights": spec.weights + (", renormalised" if spec.renormalize else ""),
        "can be merged": "no, it routes every token by itself" if config.is_routed else "yes, exactly",
        "format": str(config.format_version),
    }.items():
        table.add_row(name, value)
    return table


def _by_module(names: list[str]) -> Table:
    layers = defaultdict(set)
    for name in names:
        match = re.match(r"base_model\.model\.(.*)\.molora_A", name)
        if match:
            layers[match[1].rsplit(".", 1)[-1]].add(match[1])
    table = Table("module", "adapted linears", title="Where", title_justify="left")
    for ending, found in sorted(layers.items()):
        table.add_row(ending, str(len(found)))
    return table


def _print_report(console: Console, path: Path) -> None:
    if not path.is_file():
        return
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        console.print(f"\n{path.name} beside the adapter is damaged and left out.", soft_wrap=True)
        return
    if report["after"]:
        console.print("\nScores on held-out rows")
        scores = [[TaskScore(**score) for score in report[when]] for when in ("before", "after")]
        console.print(score_table(*scores))
    if report["routing"]:
        console.print("\nHow each task is routed, averaged over linears")
        console.print(routing_table([TaskRouting(**task) for task in report["routing"]]))
