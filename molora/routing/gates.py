"""Gates: how router logits become probabilities. One pure function each, chosen by name (`gate` in the config).

Every function takes logits `[..., E]` in fp32 or fp64, a temperature that divides them, and whether the model trains,
and returns values of the same shape and dtype. "Probability" is the word for them all, though not every gate makes
them sum to one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gate = Callable[[Tensor, float, bool], Tensor]


def softmax(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """Probabilities that compete: they sum to one over the experts."""
    return torch.softmax(logits / temperature, dim=-1)


def sigmoid(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """Probabilities that do not compete: each expert is judged alone, in (0, 1)."""
    return torch.sigmoid(logits / temperature)


def relu(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """Non-negative weights of which many are exactly zero (ReMoE, arXiv 2412.14711)."""
    return F.relu(logits / temperature)


def sparsemax(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """The point of the simplex closest to the logits: sums to one, with exact zeros (arXiv 1602.02068)."""
    scaled = logits / temperature
    ordered = scaled.sort(dim=-1, descending=True).values
    count = torch.arange(1, scaled.shape[-1] + 1, device=scaled.device, dtype=scaled.dtype)
    excess = ordered.cumsum(dim=-1) - 1
    support = (count * ordered > excess).sum(dim=-1, keepdim=True)
    level = excess.gather(-1, support - 1) / support
    return F.relu(scaled - level)


def gumbel_softmax(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """Softmax of logits plus Gumbel noise, without noise at inference (EvoMoE's dense-to-sparse gate, 2112.14397).

    With `selection="threshold"` and a temperature that falls over training, routing goes from dense to sparse.
    """
    noise = -torch.empty_like(logits).exponential_().log() if training else 0.0
    return torch.softmax((logits + noise) / temperature, dim=-1)


def relaxed_bernoulli(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """A sigmoid with logistic noise in training (Polytropon, arXiv 2202.13914); plain sigmoid at inference.

    As in PEFT's Poly, the temperature belongs to the sampling only.
    """
    if not training:
        return torch.sigmoid(logits)
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    return torch.sigmoid((logits + uniform.log() - (-uniform).log1p()) / temperature)


def identity(logits: Tensor, temperature: float = 1.0, training: bool = False) -> Tensor:
    """The logits themselves, of any sign: weights without a constraint."""
    return logits / temperature


GATES: dict[str, Gate] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "relu": relu,
    "sparsemax": sparsemax,
    "gumbel_softmax": gumbel_softmax,
    "relaxed_bernoulli": relaxed_bernoulli,
    "identity": identity,
}

SUMS_TO_ONE = frozenset({"softmax", "sparsemax", "gumbel_softmax"})
"""Gates under which a single expert always has weight one, so that its router learns nothing."""


EXACT_ZEROS = frozenset({"relu", "sparsemax"})
"""Gates that give some experts a probability of exactly zero, so that they are left out even where all are kept."""


def normalize_logits(logits: Tensor, strength: float) -> Tensor:
    """Standardise each token's logits over the experts and scale them (Skywork-MoE, arXiv 2406.06563)."""
    spread = logits.var(dim=-1, keepdim=True, unbiased=False).add(1e-12).sqrt()
    return strength * (logits - logits.mean(dim=-1, keepdim=True)) / spread
