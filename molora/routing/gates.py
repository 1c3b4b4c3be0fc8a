"""Gates: how router logits become probabilities. One pure function each, chosen by name (`gate` in the config)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities that compete: they sum to one over the experts.

    Args:
        logits: Router logits, `[..., E]`, any floating dtype.
        temperature: Divides the logits; below one sharpens, above one flattens.

    Returns:
        Probabilities `[..., E]` in fp32.
    """
    return torch.softmax(logits.float() / temperature, dim=-1)


def sigmoid(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Probabilities that do not compete: each expert is judged alone.

    Args:
        logits: Router logits, `[..., E]`, any floating dtype.
        temperature: Divides the logits; below one sharpens, above one flattens.

    Returns:
        Probabilities `[..., E]` in fp32, each in (0, 1).
    """
    return torch.sigmoid(logits.float() / temperature)


GATES: dict[str, Callable[[Tensor, float], Tensor]] = {"softmax": softmax, "sigmoid": sigmoid}
