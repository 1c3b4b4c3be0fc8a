"""Run tasks of lm-evaluation-harness on a model that is already loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from molora.data.mixture import TaskData
from molora.errors import MoloraError
from molora.evaluation.needs import check_routing
from molora.harness.results import Evaluation, scores_of
from molora.modes import evaluating

INSTALL_HINT = 'pip install "molora[eval]"'

FEWSHOT_SEED = 1234
"""Decides which examples a prompt shows; that of lm-evaluation-harness."""

BOOTSTRAP = 1000
"""Resamples for the standard error of metrics that have no formula for it."""


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = (),
    *,
    data: Sequence[TaskData] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    task_ids: int | Mapping[str, int] | None = None,
    expert_scores: Sequence[float] = (),
) -> Evaluation:
    """Evaluate a model with lm-evaluation-harness.

    Rows of `data` with choices become `multiple_choice` tasks (acc, acc_norm), those with a prompt `generate_until`
    (exact_match, token_f1), and plain text perplexities. Their prompts are encoded as in training, so `acc` and
    `exact_match` are what `molora.evaluation.score_tasks` gives. Tasks by name are what lm-evaluation-harness makes
    of them, but a decision about a whole sequence reads the prompt alone and no padding, as when text is generated.

    Args:
        model: A causal language model, plain or wrapped by PEFT. Left in the mode it was in.
        tokenizer: Its tokenizer, with a pad token.
        tasks: Names of tasks, groups or tags; `*` stands for anything.
        data: Tasks of molora's own data; their `eval` rows are scored.
        include_path: A folder with further task files (YAML). Such files may name Python functions, which are run.
        limit: Rows of each task, from its start.
        batch_size: Rows of a forward pass.
        max_new_tokens: Longest answer to the rows of `data`.
        task_ids: For routing that reads the task: one id for all rows, or one for each task in `data` by its name.
        expert_scores: For routing that reads scores: those of rows that bring none.

    Returns:
        The scores, with the versions of everything that made them.

    Raises:
        MoloraError: If lm-evaluation-harness is not installed, there is no such task, its data cannot be reached, or
            the routing reads what is not given.

    Example:
        >>> from molora.harness import evaluate  # doctest: +SKIP
        >>> print(evaluate(model, tokenizer, ["arc_easy"], limit=100).table())  # doctest: +SKIP
    """
    check_installed()
    if not tasks and not any(task.eval for task in data):
        raise MoloraError("there is nothing to evaluate: name tasks, or give data with rows to score.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise MoloraError(f"evaluating needs a decoder-only language model, got {type(model).__name__}.")
    common = task_ids if isinstance(task_ids, int) else None
    by_name = task_ids if isinstance(task_ids, Mapping) else {}
    check_routing(model, tasks, data, common, by_name, expert_scores)

    from molora.harness.lm import RoutedLM
    from molora.harness.rows import row_tasks
    from molora.harness.tasks import load_tasks

    with _quiet(), evaluating(model), torch.no_grad():
        ids = [by_name.get(task.name, common) for task in data]
        ours = [row_tasks(task, tokenizer, max_new_tokens, index) for task, index in zip(data, ids, strict=True)]
        loaded = load_tasks(tasks, [task for of_one in ours for task in of_one], include_path)
        lm = RoutedLM(model, tokenizer, batch_size=batch_size, task_id=common, expert_scores=tuple(expert_scores))
        return scores_of(_run(lm, loaded, limit), limit)


def check_installed() -> None:
    """Raise, with the command that installs it, where lm-evaluation-harness is not installed.

    Raises:
        MoloraError: That it is not.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MoloraError(f"evaluating needs lm-evaluation-harness, which is not installed: {INSTALL_HINT}") from error


def _run(lm: Any, loaded: dict[str, Any], limit: int | None) -> Any:
    """Run loaded tasks. Not `simple_evaluate`, which sets global seeds and asks the whole system for its versions."""
    from lm_eval import evaluator

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    try:
        return evaluator.evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAP)
    except ValueError as error:
        if "unsafe" in str(error) or "multimodal" in str(error):
            raise MoloraError(f"lm-evaluation-harness refuses: {error}") from error
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without the harness's warnings, which are about settings that this call does not leave to its user."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(max(logging.ERROR, before))
    try:
        yield
    finally:
        logger.setLevel(before)
