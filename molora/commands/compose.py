"""`molora compose`: turn trained LoRA adapters into one adapter that mixes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table

from molora.base import load_base
from molora.compose import (
    ImportedLora,
    compose,
    config_from_adapters,
    diversity,
    lorahub,
    read_loras,
    read_shots,
    score_candidates,
    select_experts,
)
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem, did_you_mean
from molora.runfile import keys
from molora.runfile.document import Document
from molora.runfile.overrides import apply_overrides
from molora.runfile.values import is_valid, mistakes


def run(
    out: str,
    adapters: Sequence[str],
    *,
    base_model: str | None,
    preset: str,
    overrides: Sequence[str],
    shots: str | None,
    select: int | None,
) -> int:
    """Write the mixture to a new folder, and print what it is made of and what to do with it.

    Args:
        out: Where to write; must be empty or not exist.
        adapters: Folders of the adapters.
        base_model: Name or folder; default the one all adapters name.
        preset: The method that mixes them.
        overrides: `--key value` tokens, fields of the adapter.
        shots: File of examples of the task.
        select: How many adapters to keep, chosen by the examples.

    Raises:
        ConfigError: If something asked for is impossible; nothing is written then.
        DataError: If the examples cannot be read.
    """
    console = Console()
    searches = preset.replace("_", "-") == "lorahub"
    _check_request(out, len(adapters), searches, shots, select)
    fields = _fields(overrides)
    loras = read_loras(adapters)
    name = base_model or _common_base(loras)
    examples = read_shots(shots) if shots else []
    # Mistakes show before the model is loaded. Which adapters are selected is not known yet, only how many.
    config_from_adapters(MoLoraConfig, loras if select is None else loras[:1] * select, preset, fields)
    base, tokenizer = load_base(name)
    if examples and (device := torch.accelerator.current_accelerator()):
        base.to(device)  # type: ignore[arg-type]  # a decorator of transformers hides the signature
    losses: list[float] = []
    kept = list(range(len(loras)))
    if select is not None:
        losses = score_candidates(base, adapters, examples, tokenizer)
        kept = select_experts(losses, diversity(loras), select)
    model = compose(base, [loras[index] for index in kept], preset, **fields)
    weights = lorahub(model, examples, tokenizer) if searches else []
    model.save_pretrained(out)
    console.print(_table(loras, kept, losses, weights))
    console.print(_next_step(model, out, ready=searches), markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_request(out: str, number: int, searches: bool, shots: str | None, select: int | None) -> None:
    folder = Path(out)
    problems = []
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        problems.append(Problem("OUT", f"{out!r} already exists, and nothing is overwritten; name a new folder."))
    if select is not None and shots is None:
        problems.append(Problem("--select", "needs examples to select by; give a file with --shots."))
    if select is not None and select > number:
        problems.append(Problem("--select", f"got {select}, but only {number} adapters are given."))
    if searches and shots is None:
        problems.append(Problem("--preset", "lorahub searches its weights on examples; give a file with --shots."))
    if shots is not None and select is None and not searches:
        problems.append(Problem("--shots", "is read for --select and --preset lorahub only; leave it out."))
    if problems:
        raise ConfigError(problems, "molora compose cannot do this")


def _fields(overrides: Sequence[str]) -> dict[str, Any]:
    """Read `--key value` tokens as fields of the adapter, as strictly as a run file."""
    table = {name: key for name, key in keys.top_level_keys().items() if key.group == keys.ADAPTER}
    del table["preset"]
    document = Document("molora compose")
    apply_overrides(document, overrides, lambda name: name in table and is_valid(True, table[name].hint))
    for name, value in document.data.items():
        if name not in table:
            document.report((name,), f"unknown key.{did_you_mean(name, table) or ' See `molora schema`.'}")
            continue
        for inner, message in mistakes(value, table[name].hint):
            document.report((name, *inner), message)
    document.raise_mistakes()
    return document.data


def _common_base(loras: Sequence[ImportedLora]) -> str:
    names = sorted({str(lora.config.get("base_model_name_or_path") or "") for lora in loras})
    if len(names) == 1 and names[0]:
        return names[0]
    given = ", ".join(map(repr, names)) if len(names) > 1 else "none"
    message = f"the adapters name {given}; say with --base-model which one to use."
    raise ConfigError([Problem("--base-model", message)], "molora compose cannot do this")


def _table(loras: Sequence[ImportedLora], kept: list[int], losses: list[float], weights: list[float]) -> Table:
    table = Table("expert", "adapter", "rank", "modules")
    if losses:
        table.add_column("loss on examples", justify="right")
    if weights:
        table.add_column("weight", justify="right")
    for index, lora in enumerate(loras):
        ranks = sorted({a.shape[0] for a, _, _ in lora.factors.values()})
        place = kept.index(index) if index in kept else None
        cells = ["-" if place is None else str(place), lora.name, ", ".join(map(str, ranks)), str(len(lora.factors))]
        cells += [f"{losses[index]:.4f}"] if losses else []
        cells += ["-" if place is None else f"{weights[place]:+.3f}"] if weights else []
        table.add_row(*cells, style="dim" if place is None else None)
    return table


def _next_step(model: PeftModel, out: str, ready: bool) -> str:
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if ready or not trainable:
        return f'\nThe mixture is in {out}. Ask it something:\n  molora generate {out} --prompt "..."'
    return (
        f"\nThe mixture is in {out}. {trainable:,} of its parameters are to be trained: put\n"
        f"  adapter_name_or_path: {out}\ninto a run file, and start `molora train`."
    )
