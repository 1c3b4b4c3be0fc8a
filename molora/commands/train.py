"""`molora train`: fine-tune on the tasks of a run file, and show what was gained."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict

import torch
import yaml
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from molora.commands.needs import advice_on_tasks, reads_scores, reads_tasks
from molora.commands.progress import CompactProgress
from molora.commands.session import RunData, adapt, load_model, read_tasks, tokenise, with_existing_adapter
from molora.data import TaskCollator
from molora.evaluation import TaskScore, score_table, score_tasks
from molora.report import REPORT_FILE, TaskRouting, routing_by_task, routing_table
from molora.runfile import RunFile, check_output_dir
from molora.trainers import MoLoraSFTTrainer

RESOLVED_FILE = "molora_run.yaml"
"""Written beside the adapter: the complete run file that reproduces it."""


def run(run_file: RunFile) -> int:
    """Train, score every task before and after, save the adapter, and print where it is.

    Raises:
        ConfigError: If the run file cannot be carried out as it stands.
        DataError: If a dataset cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("molora").setLevel(logging.INFO)
    # PEFT asks transformers by the old name; nothing a user of this command could change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    console = Console()
    check_output_dir(run_file)
    arguments = run_file.sft_config(dataset_kwargs={"skip_prepare_dataset": True})
    run_file = with_existing_adapter(run_file)
    tasks = read_tasks(run_file)
    set_seed(arguments.seed)
    base, tokenizer = load_model(run_file)
    data = tokenise(run_file, tasks, tokenizer, arguments.max_length)
    model = adapt(run_file, base)
    trainer = MoLoraSFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data.mixed(arguments.seed),
        eval_dataset={task.name: task.dataset for task in data.eval} or None,
        processing_class=tokenizer,
        data_collator=TaskCollator(
            tokenizer.pad_token_id, pad_to_multiple_of=run_file.training.get("pad_to_multiple_of")
        ),
    )
    CompactProgress.install(trainer)
    _introduce(console, run_file, model, data)
    before: list[TaskScore] = []
    if run_file.evaluation.evaluate_tasks:
        with model.disable_adapter():
            before = _score(run_file, model, tokenizer, data)
    trainer.train(resume_from_checkpoint=run_file.training.get("resume_from_checkpoint"))
    _check_finite(model)
    trainer.save_model()
    after, routing = [], []
    if run_file.evaluation.evaluate_tasks and data.eval:
        after = _score(run_file, model, tokenizer, data)
        routing = routing_by_task(model, data.eval, trainer.data_collator)
    _finish(console, run_file, data, before, after, routing)
    return 0


def _check_finite(model: PeftModel) -> None:
    """Refuse to save what has diverged; the trainer's own log shows a loss of 0 for NaN."""
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise RuntimeError(
            f"training diverged: {len(broken)} parameters hold NaN or infinity, {broken[0]} first. Nothing was saved; "
            "try a lower learning_rate, or a max_grad_norm."
        )


def _score(run_file: RunFile, model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: RunData) -> list[TaskScore]:
    return score_tasks(model, tokenizer, data.tasks, max_new_tokens=run_file.evaluation.eval_max_new_tokens)


def _introduce(console: Console, run_file: RunFile, model: PeftModel, data: RunData) -> None:
    trainable, total = model.get_nb_trainable_parameters()
    rows = sum(len(task.dataset) for task in data.train)
    console.print(
        f"Training {trainable:,} of {total:,} parameters ({trainable / total:.2%}) on {rows:,} rows of "
        f"{len(data.train)} task{'s' * (len(data.train) > 1)}: {', '.join(task.name for task in data.train)}.",
        highlight=False,
        soft_wrap=True,
    )
    for sentence in advice_on_tasks(run_file, data.tasks):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _finish(
    console: Console,
    run_file: RunFile,
    data: RunData,
    before: list[TaskScore],
    after: list[TaskScore],
    routing: list[TaskRouting],
) -> None:
    """Write the record of the run beside the adapter, and print it."""
    folder = run_file.output_dir
    report = {
        "tasks": [task.name for task in data.tasks],
        "before": [asdict(score) for score in before],
        "after": [asdict(score) for score in after],
        "routing": [asdict(task) for task in routing],
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    resolved = yaml.safe_dump(run_file.resolved(), sort_keys=False, allow_unicode=True)
    (folder / RESOLVED_FILE).write_text(resolved, encoding="utf-8")
    if after:
        console.print("\nScores on held-out rows")
        console.print(score_table(before, after))
    if routing:
        console.print("\nHow each task is routed, averaged over linears")
        console.print(routing_table(routing))
    console.print(f"\nThe adapter is in {folder}. Ask it something:", markup=False, highlight=False, soft_wrap=True)
    options = f" --task {data.tasks[0].name!r}" if reads_tasks(run_file.adapter) else ""
    options += ' --scores "..."' if reads_scores(run_file.adapter) else ""
    command = f'  molora generate {folder} --prompt "..."{options}'
    console.print(command, markup=False, highlight=False, soft_wrap=True)
