"""`molora inspect`: what an adapter folder holds, without loading its base model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from molora.commands.generate import read_adapter_config
from molora.commands.parameters import count_by_kind
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.evaluation import TaskScore, score_table
from molora.report import REPORT_FILE, TaskRouting, routing_table


def run(directory: str) -> int:
    """Print method, targets, parameters by kind and, if the run left a report, scores and routing.

    Raises:
        ConfigError: If the folder holds no molora adapter.
    """
    config = read_adapter_config(directory)
    if not isinstance(config, MoLoraConfig):
        raise ConfigError([Problem("DIR", f"{directory} holds a {config.peft_type} adapter, not a MOLORA one.")])
    weights = Path(directory) / "adapter_model.safetensors"
    if not weights.is_file():
        raise ConfigError([Problem("DIR", f"{directory} has a config and no adapter_model.safetensors.")])
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping, only keys()
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
    spec = config.routing_spec()
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
    report = json.loads(path.read_text(encoding="utf-8"))
    if report["after"]:
        console.print("\nScores on held-out rows")
        scores = [[TaskScore(**score) for score in report[when]] for when in ("before", "after")]
        console.print(score_table(*scores))
    if report["routing"]:
        console.print("\nHow each task is routed, averaged over linears")
        console.print(routing_table([TaskRouting(**task) for task in report["routing"]]))
