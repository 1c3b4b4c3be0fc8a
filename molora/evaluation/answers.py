"""Greedy answers to prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from molora.data.formats import Example
from molora.data.tokenize import encode_parts
from molora.evaluation.rows import tail
from molora.heads import generation_needs
from molora.likelihood import pad_with_mask, routed


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    limit: int,
    batch_size: int,
    max_new_tokens: int,
    tick: Callable[[int], Any],
    task_id: int | None = None,
) -> list[str]:
    """Return the greedy answer to each example's prompt.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its tokenizer, with a pad token.
        examples: Only prompt and expert scores are read.
        limit: Tokens the model can read.
        batch_size: Prompts a batch.
        max_new_tokens: Longest answer, if the context has room for it.
        tick: Told how many rows are done.
        task_id: The task of all rows, for routing that reads it.
    """
    longest = min(max_new_tokens, limit - 1)
    prompts = [tail(encode_parts(example, tokenizer)[0], limit - longest) for example in examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    config = _greedy(model, tokenizer, longest)
    device = next(model.parameters()).device
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad_with_mask([prompts[index] for index in batch], int(tokenizer.pad_token_id), "left", device)
        with routed(model, task_id, [examples[index].expert_scores for index in batch]):
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for index, row in zip(batch, output[:, ids.shape[1] :], strict=True):
            answers[index] = str(tokenizer.decode(row, skip_special_tokens=True))
        tick(len(batch))
    return answers


def _greedy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Return plain greedy decoding, whatever sampling the model's own generation settings ask for."""
    own = getattr(model, "generation_config", None)
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        use_cache=generation_needs(model).get("use_cache", True),
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
