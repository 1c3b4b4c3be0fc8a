"""The side of PyTorch: what transformers and the adapter make of tokens that were served."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from molora.base import load_base
from molora.errors import ConfigError, Problem
from molora.serving.comparison import Scores

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Sentence: a gripping and moving film.\nIs the opinion positive or negative?",
    "What is 17 plus 25?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Translate into German: The weather is nice today.",
    "Question: Which customers are from Rome? Table: customers (name, city). Answer in SQL.",
)
"""Of different kinds, so that different experts are likely to be chosen."""


def prompt_ids(directory: str, base: str, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts, through the chat template if there is one, so that both sides read the same.

    Args:
        directory: Folder of the adapter, with its tokenizer if it has one of its own.
        base: The base model.
        prompts: Texts.

    Raises:
        ConfigError: If a prompt is empty.
    """
    own = (Path(directory) / "tokenizer_config.json").exists()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory if own else base)
    found = [_ids(tokenizer, prompt) for prompt in prompts]
    if not all(found):
        raise ConfigError([Problem("--prompt", "is empty; give some text.")], "nothing to ask")
    return found


class Reference:
    """An adapter on its base model in transformers, and the base model without it.

    Args:
        directory: Folder of the adapter, of any kind.
        base: The base model.
        dtype: Precision of the base model.
    """

    def __init__(self, directory: str, base: str, dtype: torch.dtype) -> None:
        model, tokenizer = load_base(base, dtype=dtype)
        self.ends = _ends(model, tokenizer)
        self.model = PeftModel.from_pretrained(model, directory).eval()
        device = torch.accelerator.current_accelerator()
        if device is not None:
            self.model.to(device)

    @torch.no_grad()
    def score(self, prompt: Sequence[int], tokens: Sequence[int], adapted: bool) -> Scores:
        """Read a prompt and an answer at once, and say how probable every token of the answer was.

        Args:
            prompt: Its token ids.
            tokens: Those of the answer.
            adapted: With the adapter, or the base model alone.
        """
        if not tokens:
            return Scores((), ())
        ids = torch.tensor([[*prompt, *tokens]], device=self.model.device)
        with nullcontext() if adapted else self.model.disable_adapter():
            logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        chosen = logprobs.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        return Scores(chosen.tolist(), logprobs.amax(dim=1).tolist())


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if not prompt.strip():
        return []
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}]
    found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(found["input_ids"])


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that may end an answer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config.get_text_config(), tokenizer):
        given = getattr(holder, "eos_token_id", None)
        found |= {given} if isinstance(given, int) else set(given or ())
    return frozenset(found)
