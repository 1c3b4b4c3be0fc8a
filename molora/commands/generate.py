"""`molora generate`: answer prompts with a trained adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.commands.needs import reads_scores, reads_tasks, scores_per_row, task_id
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem, did_you_mean
from molora.heads import generation_needs
from molora.loaded import load_adapted
from molora.report import known_tasks


def run(
    directory: str,
    prompts: list[str],
    *,
    max_new_tokens: int,
    temperature: float,
    base_model: str | None,
    task: str | None = None,
    scores: list[float] | None = None,
) -> int:
    """Print the answer to each prompt.

    Args:
        directory: Folder of the adapter.
        prompts: Questions; put through the chat template if the tokenizer has one.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token each time.
        base_model: Base model to use instead of the one named in the adapter.
        task: Name or id of the prompts' task, for adapters whose routing reads it.
        scores: A number per expert, likewise.

    Raises:
        ConfigError: If there is no adapter in the folder, its base model is not known, or its routing needs something
            that is not given.
    """
    config = read_adapter_config(directory)
    read_adapter_tensors(directory)  # a damaged file is better found before the base model is loaded
    given = _routing_inputs(directory, config, task, scores)
    model, tokenizer = load_adapted(directory, config, base_model)
    for prompt in prompts:
        print(answer(model, tokenizer, prompt, max_new_tokens, temperature, given), flush=True)  # noqa: T201
    return 0


def _routing_inputs(
    directory: str, config: MoLoraConfig, task: str | None, scores: list[float] | None
) -> dict[str, torch.Tensor]:
    """What the adapter's routing is given besides the tokens; one row holds for any batch."""
    problems, given = [], {}
    if reads_tasks(config):
        names, number = known_tasks(directory), config.num_tasks or 1
        index = task_id(task, names, number)
        if index is None:
            known = [f"{place} {name}" for place, name in enumerate(names)] or [f"numbers from 0 to {number - 1}"]
            said = "the routing reads the prompt's task; name it." if task is None else f"there is no task {task!r}."
            hint = did_you_mean(task, names) if task is not None else ""
            problems.append(Problem("--task", f"{said} Known are {', '.join(known)}.{hint}"))
        given["task_ids"] = torch.tensor([index or 0])
    elif task is not None:
        problems.append(Problem("--task", "this adapter's routing reads no task; leave it out."))
    if reads_scores(config):
        wanted = scores_per_row(config)
        if scores is None or [len(scores)] != wanted:
            said = "none are given" if scores is None else f"got {len(scores)}"
            numbers = " or ".join(map(str, wanted))
            problems.append(Problem("--scores", f"the routing reads {numbers} numbers, one per expert; {said}."))
        given["expert_scores"] = torch.tensor([scores or [0.0]])
    elif scores is not None:
        problems.append(Problem("--scores", "this adapter's routing reads no scores; leave them out."))
    if problems:
        raise ConfigError(problems, f"cannot generate with {directory}")
    return given


@torch.no_grad()
def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    given: Mapping[str, torch.Tensor],
) -> str:
    """Continue one prompt and return only what is new; `given` are further keywords, for the routing."""
    messages = [{"role": "user", "content": prompt}]
    inputs: Any = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        if tokenizer.chat_template
        else tokenizer(prompt, return_tensors="pt")
    )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
        **generation_needs(model),
        **{name: values.to(model.device) for name, values in given.items()},
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
