"""What an export costs: how far the exported model's predictions are from the routed one's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from molora.modes import evaluating
from molora.plain.moments import Batch, run_batch
from molora.progress import tracked

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


def twin_of(model: nn.Module, own_biases: bool = False) -> nn.Module:
    """A copy of a model that shares its parameters and buffers, so that it takes no memory.

    Adapters put on the one are not on the other. Merging into either would change both.

    Args:
        model: The model.
        own_biases: Give it biases of its own, as adapters that train them overwrite them.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    shared: dict[int, Any] = {id(t): t for name, t in tensors if not (own_biases and name.endswith("bias"))}
    return copy.deepcopy(model, shared)


class Compared(NamedTuple):
    """Two models on the same rows.

    Attributes:
        routed: The one compared with; its `kl` is `None`.
        other: The one to judge.
    """

    routed: Divergence
    other: Divergence


@torch.no_grad()
def divergences(
    routed: nn.Module,
    other: nn.Module,
    batches: Sequence[Batch],
    block: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Compared:
    """Compare the predictions of two models on labelled rows.

    Args:
        routed: The model to compare with.
        other: The model to judge.
        batches: Keyword arguments of the models, with `labels`; -100 marks tokens that do not count.
        block: Makes `other` what it is while it runs, if the two are one model with another adapter active.
    """
    own, across = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    with evaluating(routed, other):
        for batch in tracked(batches, "comparing", "batch"):
            wanted, labels = _predictions(routed, batch)
            with block():
                given, _ = _predictions(other, batch)
            own += _sums(wanted, wanted, labels)
            across += _sums(wanted, given, labels)
    return Compared(_divergence(own, with_kl=False), _divergence(across, with_kl=True))


def _divergence(sums: Tensor, with_kl: bool) -> Divergence:
    kl, loss, count = sums.tolist()
    count = max(count, 1)
    return Divergence(kl / count if with_kl else None, math.exp(min(loss / count, 700.0)), int(count))


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
