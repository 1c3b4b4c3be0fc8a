"""What an export costs: how far the exported model's predictions are from the routed one's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from tqdm.auto import tqdm

from molora.export.moments import Batch, run_batch
from molora.modes import evaluating

IGNORED = -100
POSITIONS = 512
"""Tokens whose logits are held in fp32 at a time."""


@dataclass(frozen=True)
class Divergence:
    """How a model's predictions compare.

    Attributes:
        kl: Mean over tokens of KL(routed ‖ model), in nats; `None` without a model to compare with.
        perplexity: exp of the mean negative log-likelihood of the labelled tokens.
        tokens: Tokens counted.
    """

    kl: float | None
    perplexity: float
    tokens: int


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters and buffers, so that it takes no memory.

    Adapters put on the one are not on the other. Merging into either would change both.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.no_grad()
def divergences(
    routed: nn.Module,
    others: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    progress: bool = False,
) -> dict[str, Divergence]:
    """Compare the predictions of several models on labelled rows.

    Args:
        routed: The model to compare with; its own perplexity is in the result as `routed`.
        others: By name, a block in which `model` is the one to judge, such as one with another adapter active.
        model: What runs inside the blocks.
        batches: Keyword arguments of the models, with `labels`; -100 marks tokens that do not count.
        progress: Show a progress bar.

    Returns:
        By name, `routed` first.
    """
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("routed", *others)}
    with evaluating(routed, model):
        for batch in tqdm(batches, desc="comparing", unit="batch", disable=not progress):
            wanted, labels = _predictions(routed, batch)
            sums["routed"] += _sums(wanted, wanted, labels)
            for name, block in others.items():
                with block():
                    given, _ = _predictions(model, batch)
                sums[name] += _sums(wanted, given, labels)
    return {
        name: Divergence(
            None if name == "routed" else float(kl / count), math.exp(min(float(loss / count), 700.0)), int(count)
        )
        for name, (kl, loss, count) in sums.items()
    }


def _predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]` of the labelled tokens, each from the token before it, and the labels `[T]`."""
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    logits = run_batch(model, batch, **options).logits[:, :-1]
    labels = batch["labels"][:, 1:].to(logits.device)
    counted = labels != IGNORED
    return logits[counted], labels[counted]


def _sums(wanted: Tensor, given: Tensor, labels: Tensor) -> Tensor:
    """Summed KL, summed negative log-likelihood and number of tokens, `[3]`, fp64."""
    total = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(labels), POSITIONS):
        part = slice(start, start + POSITIONS)
        target, predicted = (log_softmax(logits[part].float(), dim=-1) for logits in (wanted, given))
        total[0] += float((target.exp() * (target - predicted)).sum(dtype=torch.float64))
        total[1] += float(cross_entropy(predicted, labels[part], reduction="sum"))
    total[2] = len(labels)
    return total
