"""`molora generate`: answer prompts with a trained adapter."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

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
    """Print the answer to each prompt, while it comes.

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
    model, tokenizer, given = opened(directory, base_model, task, scores)
    for prompt in prompts:
        answer(model, tokenizer, [user(prompt)], max_new_tokens, temperature, given, Streamer(tokenizer))
    return 0


def opened(
    directory: str, base_model: str | None, task: str | None, scores: list[float] | None
) -> tuple[PeftModel, PreTrainedTokenizerBase, dict[str, torch.Tensor]]:
    """An adapter on its base model, the tokenizer, and what its routing is given besides the tokens.

    Args:
        directory: Folder of the adapter.
        base_model: Base model to use instead of the one named in the adapter.
        task: Name or id of the task, for adapters whose routing reads it.
        scores: A number per expert, likewise.

    Raises:
        ConfigError: As `run`.
    """
    config = read_adapter_config(directory)
    read_adapter_tensors(directory)  # a damaged file is better found before the base model is loaded
    given = _routing_inputs(directory, config, task, scores)
    model, tokenizer = load_adapted(directory, config, base_model)
    return model, tokenizer, given


class Streamer(TextStreamer):
    """Writes an answer while it comes, without white space around it, and ends the line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._spaces: str | None = None

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain; white space waits until something follows it."""
        kept = text.rstrip()
        if kept:
            sys.stdout.write(kept.lstrip() if self._spaces is None else self._spaces + kept)
            self._spaces = text[len(kept) :]
        elif self._spaces is not None:
            self._spaces += text
        if stream_end:
            sys.stdout.write("\n")
        sys.stdout.flush()


def user(text: str) -> dict[str, str]:
    """A message of the user."""
    return {"role": "user", "content": text}


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


def encoded(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> Any:
    """Token ids `[1, S]` of a conversation, through the chat template if there is one; else of its last message."""
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"], return_tensors="pt")
    return tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


@torch.no_grad()
def answer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    max_new_tokens: int,
    temperature: float,
    given: Mapping[str, torch.Tensor],
    streamer: TextStreamer | None = None,
) -> torch.Tensor:
    """Continue a conversation.

    Args:
        model: The adapted model.
        tokenizer: Its tokenizer.
        messages: The conversation; without a chat template its last message is what is continued.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token each time.
        given: Further keywords, for the routing.
        streamer: Told of every token.

    Returns:
        Ids of conversation and answer, `[S]`.
    """
    inputs = encoded(tokenizer, messages).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output: torch.Tensor = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
        **sampling,
        **generation_needs(model),
        **{name: values.to(model.device) for name, values in given.items()},
    )
    return output[0]
