"""`molora train`: fine-tune on the tasks of a run file, and show what was gained."""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, replace

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from rich.console import Console
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.logging import disable_progress_bar

from molora.base import resolve_base
from molora.card.job import update_card
from molora.commands.needs import advice_on_tasks, reads_scores, reads_tasks
from molora.commands.progress import CompactProgress
from molora.commands.session import RunData, adapt, load_model, read_tasks, tokenise, with_existing_adapter
from molora.data import TaskCollator
from molora.errors import MoloraError
from molora.evaluation import TaskScore, score_table, score_tasks
from molora.evaluation.record import ROWS_FILE, as_entries, write_rows
from molora.quantization import RUN_FILE
from molora.report import REPORT_FILE, TaskRouting, routing_by_task, routing_table
from molora.runfile import RunFile, check_output_dir
from molora.trainers import MoLoraSFTTrainer

_EXPERTS_OF_BASE = ("num_experts", "num_local_experts", "n_routed_experts")
"""Fields of a base model's configuration that make it a mixture of experts itself."""

_SHARDING = ("FSDP", "DEEPSPEED")
"""What accelerate's launcher may ask of a process, by environment variables such as `ACCELERATE_USE_FSDP`."""


def run(run_file: RunFile) -> int:
    """Train, score every task before and after, save the adapter, and print where it is.

    Raises:
        ConfigError: If the run file cannot be carried out as it stands.
        DataError: If a dataset cannot be used.
    """
    check_output_dir(run_file)
    arguments = run_file.sft_config(dataset_kwargs={"skip_prepare_dataset": True})
    state = PartialState()  # which the line above has set up
    run_file = _as_launched(run_file, state)
    state.wait_for_everyone()  # no process writes before the last one has seen what `output_dir` holds
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("molora").setLevel(logging.INFO if state.is_main_process else logging.WARNING)
    console = Console(quiet=not state.is_main_process)
    if not state.is_main_process:
        disable_progress_bar()
    run_file = with_existing_adapter(run_file)
    with state.local_main_process_first():  # the others find what it downloaded or converted
        tasks = read_tasks(run_file)
        _fetch_base(run_file)
    set_seed(arguments.seed)
    base, tokenizer = load_model(run_file)
    data = tokenise(run_file, tasks, tokenizer, arguments.max_length)
    model = adapt(run_file, base)
    if "ddp_find_unused_parameters" not in run_file.training:
        # Every adapted linear of a dense model runs in every step; looking for others costs time, and a warning.
        text = base.config.get_text_config()
        arguments.ddp_find_unused_parameters = any(getattr(text, name, None) for name in _EXPERTS_OF_BASE)
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
    scored, sharded = run_file.evaluation.evaluate_tasks, _is_sharded(trainer)
    # A model that is shared out takes its place on the devices when training starts, and its base does not change.
    before = _score_base(run_file, model, tokenizer, data) if scored and not sharded else []
    if state.is_main_process:
        _write_run_file(run_file)  # a checkpoint needs it too, to be asked as it was trained
    resume = run_file.training.get("resume_from_checkpoint")
    trainer.train(resume_from_checkpoint=os.path.expanduser(resume) if isinstance(resume, str) else resume)
    _check_finite(model)
    trainer.save_model()
    trainer.save_state()  # the log, and how every linear was routed over the training
    after, routing = [], []
    if scored and data.eval:
        if sharded:
            before = _score_base(run_file, model, tokenizer, data, together=True)
        after = _score(run_file, model, tokenizer, data, together=sharded)
        routing = routing_by_task(model, data.eval, trainer.data_collator)
    if state.is_main_process:
        _finish(console, run_file, data, before, after, routing)
    state.wait_for_everyone()  # a process that leaves first takes the others down with it
    return 0


def _as_launched(run_file: RunFile, state: PartialState) -> RunFile:
    """Return the run with the number of processes there are.

    Raises:
        ConfigError: If the launcher started other processes than the run file asks for.
    """
    asked = [name for name in _SHARDING if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"]
    if asked and state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        message = f"accelerate was told to use {asked[0]} and shares no model among CPUs; use 'ddp', or GPUs."
        raise run_file.error("accelerate_config", message)
    if "FSDP" in asked and os.environ.get("FSDP_VERSION") != "2":
        raise run_file.error("accelerate_config", "FSDP 1 is not supported here; set `fsdp_version: 2`.")
    given = run_file.launch.num_processes
    if given not in (None, state.num_processes):
        message = f"got {given}, and the launcher started {state.num_processes}; leave the key out, or change one."
        raise run_file.error("num_processes", message)
    if given is None and state.num_processes == 1:
        return run_file
    return replace(run_file, launch=replace(run_file.launch, num_processes=state.num_processes))


def _fetch_base(run_file: RunFile) -> None:
    """Convert the packaged model in one process; whatever is wrong, `load_model` says with its line."""
    with suppress(MoloraError):
        resolve_base(run_file.model.model_name_or_path)


def _is_sharded(trainer: MoLoraSFTTrainer) -> bool:
    """Whether each process holds a part of the model only, so that all must run each forward together."""
    return trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()


def _check_finite(model: PeftModel) -> None:
    """Refuse to save what has diverged; the trainer's own log shows a loss of 0 for NaN."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    broken = gather_object([name for name, p in trained if not torch.isfinite(_held_here(p)).all()])
    if broken:
        raise RuntimeError(
            f"training diverged: {len(set(broken))} parameters hold NaN or infinity, {broken[0]} first. Nothing was "
            "saved; try a lower learning_rate, or a max_grad_norm."
        )


def _held_here(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part: torch.Tensor = getattr(parameter, "ds_tensor", parameter)  # DeepSpeed ZeRO-3 leaves the rest empty
    return part


def _score(
    run_file: RunFile,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    together: bool = False,
) -> list[TaskScore]:
    """Score every task: each process some of them, or all of them together where none has the whole model."""
    state, tasks = PartialState(), data.tasks
    if not together:
        here = range(state.process_index, len(tasks), state.num_processes)
        tasks = [task if index in here else replace(task, eval=[]) for index, task in enumerate(tasks)]
    longest = run_file.evaluation.eval_max_new_tokens
    scores = score_tasks(model, tokenizer, tasks, max_new_tokens=longest, progress=state.is_main_process)
    if together:
        return scores
    places = {task.name: index for index, task in enumerate(data.tasks)}
    everyones: list[TaskScore] = gather_object(scores)
    return sorted(everyones, key=lambda score: places[score.task])


def _score_base(
    run_file: RunFile, model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: RunData, together: bool = False
) -> list[TaskScore]:
    """Score the model without its adapter."""
    with model.disable_adapter():
        return _score(run_file, model, tokenizer, data, together)


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


def _write_run_file(run_file: RunFile) -> None:
    """Write the complete run file, which reproduces the run, beside the adapter."""
    run_file.output_dir.mkdir(parents=True, exist_ok=True)
    resolved = yaml.safe_dump(run_file.resolved(), sort_keys=False, allow_unicode=True)
    (run_file.output_dir / RUN_FILE).write_text(resolved, encoding="utf-8")


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
        "before": as_entries(before),
        "after": as_entries(after, before),
        "routing": [asdict(task) for task in routing],
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    update_card(folder)
    if after:
        write_rows(folder / ROWS_FILE, data.tasks, before=before, after=after)
        console.print("\nScores on held-out rows; ± is a standard error over rows")
        console.print(score_table(before, after))
    if routing:
        console.print("\nHow each task is routed, averaged over linears")
        console.print(routing_table(routing))
    console.print(f"\nThe adapter is in {folder}. Ask it something:", markup=False, highlight=False, soft_wrap=True)
    options = f" --task {data.tasks[0].name!r}" if reads_tasks(run_file.adapter) else ""
    options += ' --scores "..."' if reads_scores(run_file.adapter) else ""
    command = f'  molora generate {folder} --prompt "..."{options}'
    console.print(command, markup=False, highlight=False, soft_wrap=True)
