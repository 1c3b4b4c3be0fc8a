"""What `train` and `plan` share: the data of a run, tokenised and checked, and the model with its adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from molora.adapters import read_adapter_config
from molora.base import ensure_pad_token, load_base, resolve_base
from molora.commands.needs import check_needs
from molora.config import MoLoraConfig
from molora.data import TaskData, TokenizedTask, load_tasks, mix, tokenize_tasks
from molora.errors import ConfigError, DataError, MoloraError, Problem, TargetModulesError
from molora.quantization import Quantization, QuantizationError
from molora.runfile import RunFile
from molora.targets import check_modules_to_save

_MATCHED_BY_PEFT = ("rank_pattern", "alpha_pattern", "exclude_modules")


@dataclass(frozen=True)
class RunData:
    """The datasets of a run.

    Attributes:
        tasks: All examples by task; a task's position is its id.
        train: Tokenised training rows by task.
        eval: Tokenised evaluation rows by task; only tasks that have some.
    """

    tasks: list[TaskData]
    train: list[TokenizedTask]
    eval: list[TokenizedTask]

    def mixed(self, seed: int) -> Dataset:
        """One epoch over all tasks, by their weights."""
        return mix([task.dataset for task in self.train], [task.weight for task in self.tasks], seed)


def read_tasks(run: RunFile) -> list[TaskData]:
    """Read the datasets of a run and check that its routing can use them; needs no model, so mistakes show first.

    Raises:
        ConfigError: Listing every dataset that cannot be used, with the line that names it, or what the routing reads
            and the data lacks.
        DataError: If the datasets do not go together.
    """
    seed = run.training.get("seed", 42)
    try:
        tasks = load_tasks(run.datasets, seed)
    except DataError as error:
        problems = [problem for index, _ in enumerate(run.datasets) for problem in _mistakes(run, index, seed)]
        if not problems:
            raise
        raise ConfigError(problems, f"{run.path}: unusable data") from error
    check_needs(run, tasks)
    return tasks


def _mistakes(run: RunFile, index: int, seed: int) -> Iterator[Problem]:
    try:
        load_tasks([run.datasets[index]], seed)
    except DataError as error:
        yield Problem(f"datasets.{index}", str(error), run.where(f"datasets.{index}.path"))


def tokenise(
    run: RunFile, tasks: list[TaskData], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> RunData:
    """Tokenise the training and evaluation rows of every task.

    Raises:
        ConfigError: If a task has no token to learn from; points at the line of its dataset.
    """
    try:
        train = tokenize_tasks(tasks, tokenizer, max_length)
        return RunData(tasks, train, tokenize_tasks(tasks, tokenizer, max_length, split="eval"))
    except DataError as error:
        raise run.error("max_length" if run.gives("max_length") else "datasets", str(error)) from error


def load_model(run: RunFile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model and its tokenizer, with mistakes pointing at the run file's line."""
    model = run.model
    try:
        return load_base(
            model.model_name_or_path,
            dtype=model.dtype,
            revision=model.model_revision,
            attn_implementation=model.attn_implementation,
            trust_remote_code=model.trust_remote_code,
            quantization=Quantization.of(model),
        )
    except QuantizationError as error:
        asked = next((key for key in ("load_in_4bit", "load_in_8bit") if getattr(model, key)), "model_name_or_path")
        raise run.error(asked, str(error)) from error
    except MoloraError as error:
        raise run.error("model_name_or_path", str(error)) from error


def load_skeleton(run: RunFile) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Build the base model without its weights, on the meta device, and load its tokenizer."""
    model = run.model
    common = {"revision": model.model_revision or "main", "trust_remote_code": model.trust_remote_code}
    try:
        path = resolve_base(model.model_name_or_path)
        config = AutoConfig.from_pretrained(path, **common)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        ensure_pad_token(tokenizer, int(config.get_text_config().vocab_size))
    except (OSError, ValueError) as error:
        raise run.error("model_name_or_path", str(error)) from error
    dtype = model.dtype if model.dtype != "auto" else (config.dtype or torch.float32)
    return skeleton.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype), tokenizer


def with_existing_adapter(run: RunFile) -> RunFile:
    """Return the run with the config of the adapter it continues, if it continues one.

    Raises:
        ConfigError: If the folder holds no molora adapter, or keys of the run file contradict it.
    """
    existing = run.model.adapter_name_or_path
    if existing is None:
        return run
    try:
        saved = read_adapter_config(existing)
    except ConfigError as error:
        raise run.error("adapter_name_or_path", "; ".join(map(str, error.problems))) from error
    problems = []
    for field in MoLoraConfig.user_fields():
        given, kept = getattr(run.adapter, field.name), getattr(saved, field.name)
        # A shorthand for targets is resolved when an adapter is made, so it cannot be compared.
        if run.gives(field.name) and field.name != "target_modules" and given != kept:
            message = f"got {given!r}, but the adapter being continued was made with {kept!r}; leave the key out."
            problems.append(Problem(field.name, message, run.where(field.name)))
    if problems:
        raise ConfigError(problems, f"{run.path} contradicts the adapter in {existing}")
    return replace(run, adapter=saved, preset=None)


def adapt(run: RunFile, model: PreTrainedModel) -> PeftModel:
    """Put the run's adapter on the model: a fresh one, or the existing one it continues.

    Raises:
        ConfigError: If a name in the adapter's keys matches no module.
    """
    existing = run.model.adapter_name_or_path
    on_meta = model.device.type == "meta"
    if existing is not None:
        return PeftModel.from_pretrained(model, existing, is_trainable=True, low_cpu_mem_usage=on_meta)
    try:
        check_modules_to_save(run.adapter, model)
    except TargetModulesError as error:
        raise run.error("modules_to_save", str(error)) from error
    try:
        with warnings.catch_warnings():
            # PEFT only warns when a pattern or an exclusion matches nothing; in a file it is a mistake.
            for name in _MATCHED_BY_PEFT:
                warnings.filterwarnings("error", message=f".*{name}")
            return get_peft_model(model, run.adapter, low_cpu_mem_usage=on_meta)
    except Warning as warning:
        field = next(name for name in _MATCHED_BY_PEFT if name in str(warning))
        raise run.error(field, str(warning)) from warning
    except ValueError as error:
        raise run.error("target_modules", str(error)) from error
