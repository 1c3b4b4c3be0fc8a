"""`molora plan`: everything a run would do, short of doing it. Loads no weights."""

from __future__ import annotations

import math
from collections import defaultdict

import yaml
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from molora.bank import MoLoraLayer
from molora.calibration import needs_calibration
from molora.commands.needs import advice_on_tasks
from molora.commands.session import RunData, adapt, load_skeleton, read_tasks, tokenise, with_existing_adapter
from molora.data import format_preview
from molora.errors import ConfigError
from molora.parameters import count_by_kind, module_kind
from molora.quantization import Quantization
from molora.runfile import RunFile, check_output_dir


def run(run_file: RunFile) -> int:
    """Print the resolved configuration, matched modules, parameters, memory, and what the model would see.

    Raises:
        ConfigError: If the run file cannot be carried out as it stands.
        DataError: If a dataset cannot be used.
    """
    console = Console()
    arguments = run_file.sft_config()
    run_file = with_existing_adapter(run_file)
    tasks = read_tasks(run_file)
    base, tokenizer = load_skeleton(run_file)
    data = tokenise(run_file, tasks, tokenizer, arguments.max_length)
    model = adapt(run_file, base)
    console.print("Resolved configuration", style="bold")
    resolved = yaml.safe_dump(run_file.resolved(), sort_keys=False, allow_unicode=True)
    console.print(resolved, highlight=False, markup=False, soft_wrap=True)
    console.print(_modules(model))
    console.print(_parameters(model))
    console.print(_memory(run_file, model, arguments, data))
    console.print(_datasets(data, arguments))
    if needs_calibration(model):
        rows = min(run_file.adapter.calibration_rows, sum(len(task.dataset) for task in data.train))
        console.print(f"\nRouters start from {rows} training rows, which are looked at before the first step.")
    _preview(console, data, tokenizer, arguments)
    for sentence in advice_on_tasks(run_file, tasks):
        console.print(f"\n{sentence}", highlight=False, markup=False, soft_wrap=True)
    try:
        check_output_dir(run_file)
    except ConfigError as error:
        console.print(f"\n`molora train` would stop here: {error}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _modules(model: PeftModel) -> Table:
    found: dict[tuple[str, int, int], list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLayer):
            found[module_kind(name), module.in_features, module.out_features].append(name)
    table = Table("module", "in", "out", "number", title="Matched modules", title_justify="left")
    for (ending, size_in, size_out), names in found.items():
        table.add_row(ending, str(size_in), str(size_out), str(len(names)))
    table.add_row("all", "", "", str(sum(map(len, found.values()))), style="bold")
    return table


def _parameters(model: PeftModel) -> Table:
    counts = count_by_kind((name, p) for name, p in model.named_parameters() if p.requires_grad)
    trainable, total = model.get_nb_trainable_parameters()
    table = Table("trainable", "number", title="Parameters", title_justify="left")
    for kind, number in counts.items():
        table.add_row(kind, f"{number:,}")
    table.add_row("all trainable", f"{trainable:,} ({trainable / total:.2%} of {total:,})", style="bold")
    return table


def _memory(run_file: RunFile, model: PeftModel, arguments: SFTConfig, data: RunData) -> Table:
    """Weights, gradients and optimizer are counted; activations are a rule of thumb and say so."""
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    frozen = Quantization.of(run_file.model).bytes_of(model)
    longest = max(len(row) for task in data.train for row in task.dataset["input_ids"])
    tokens = arguments.per_device_train_batch_size * longest
    parts = {
        "frozen weights": frozen,
        "adapter weights": trainable,
        "gradients": trainable,
        "optimizer (two moments, as AdamW)": 2 * trainable,
        f"activations (rough, {tokens:,} tokens)": _activations(model, arguments, tokens),
    }
    table = Table("memory", "MiB", title="Memory estimate for training", title_justify="left")
    for name, size in {**parts, "all": sum(parts.values())}.items():
        table.add_row(name, f"{size / 2**20:,.0f}", style="bold" if name == "all" else "")
    return table


def _activations(model: PeftModel, arguments: SFTConfig, tokens: int) -> float:
    # What autograd keeps of an adapted module is its input, once per sibling that reads it, plus the fp32 copy that
    # routing reads; checkpointing keeps one hidden state per layer and the activations of a single layer.
    width = 2 if arguments.bf16 or arguments.fp16 else 4
    inputs = sum(module.in_features * (width + 4) for module in model.modules() if isinstance(module, MoLoraLayer))
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    if arguments.activation_checkpointing:
        return tokens * (layers * hidden * width + inputs / layers)
    return tokens * inputs


def _datasets(data: RunData, arguments: SFTConfig) -> Table:
    table = Table(title="Datasets", title_justify="left")
    for column in ("task", "rows", "weight", "tokens", "supervised", "cut", "left out", "held-out rows"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task, tokenised in zip(data.tasks, data.train, strict=True):
        tokens = sum(len(ids) for ids in tokenised.dataset["input_ids"])
        table.add_row(
            task.name,
            str(len(tokenised.dataset)),
            f"{task.weight:g}",
            f"{tokens:,}",
            f"{tokenised.supervised_tokens:,}",
            str(tokenised.truncated),
            str(tokenised.dropped),
            str(len(task.eval)),
        )
    rows = len(data.mixed(arguments.seed))
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    steps = math.ceil(rows / batch)
    planned = arguments.max_steps if arguments.max_steps > 0 else math.ceil(steps * arguments.num_train_epochs)
    table.caption = f"{rows:,} rows an epoch, {batch} rows a step, {planned:,} steps on one device"
    table.caption_justify = "left"
    return table


def _preview(console: Console, data: RunData, tokenizer: PreTrainedTokenizerBase, arguments: SFTConfig) -> None:
    for task, tokenised in zip(data.tasks, data.train, strict=True):
        prompt, completion = format_preview(task.train[0], tokenizer, arguments.max_length)
        supervised = sum(label != -100 for label in tokenised.dataset[0]["labels"])
        console.print(
            f"\n[bold]First row of {escape(task.name)}[/], {supervised} supervised tokens, which are in brackets ⟦⟧",
        )
        console.print(f"{prompt}⟦{completion}⟧", highlight=False, markup=False, soft_wrap=True)
