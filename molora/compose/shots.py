"""A few examples of a task, and how well a model explains them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from molora.data import Example, encode_parts, examples_of, read_rows
from molora.errors import DataError
from molora.likelihood import Prompted, likelihoods
from molora.progress import tracked

BATCH_SIZE = 8


def read_shots(path: str) -> list[Example]:
    """Read the examples of a file, of any shape that `molora train` reads.

    Raises:
        DataError: If there is no such file, or no example in it.
    """
    return [example for row in read_rows(str(Path(path).absolute())) for example in examples_of(row, "shots")]


def encode_shots(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Prompted]:
    """Encode each example as at training; a text that follows nothing is scored from its second token on.

    Raises:
        DataError: If there is nothing to score.
    """
    rows = []
    for example in examples:
        prompt, completion = encode_parts(example, tokenizer)
        ids = prompt + completion
        start = len(prompt) or 1
        if ids[start:]:
            rows.append(Prompted(ids[:start], [ids[start:]]))
    if not rows:
        raise DataError(f"none of the {len(examples)} examples has a completion to score; give at least one.")
    return rows


@torch.no_grad()
def shot_loss(model: nn.Module, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Prompted]) -> float:
    """Return the mean over the examples of the mean negative log-likelihood of a completion's token."""
    scores = likelihoods(model, int(tokenizer.pad_token_id), shots, BATCH_SIZE, lambda _: None)
    return -sum(score.total / len(row.completions[0]) for [score], row in zip(scores, shots, strict=True)) / len(shots)


def score_candidates(
    base_model: Any,
    folders: Sequence[str | Path],
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """Score adapters on a few examples: the loss of the base model with one adapter after the other.

    Args:
        base_model: A causal language model; it is left as it was.
        folders: Adapter folders, loaded by PEFT.
        examples: The examples, with the answers a good expert would give.
        tokenizer: The model's tokenizer, with a pad token.

    Returns:
        One loss a folder, lower is better.
    """
    shots = encode_shots(examples, tokenizer)
    was_training = base_model.training
    trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    losses = []
    for folder in tracked(folders, "scoring adapters", "adapter"):
        model = PeftModel.from_pretrained(base_model, str(folder)).eval()
        try:
            losses.append(shot_loss(model, tokenizer, shots))
        finally:
            model.unload()
            base_model.train(was_training)
            for parameter in trainable:
                parameter.requires_grad_(True)
    return losses
