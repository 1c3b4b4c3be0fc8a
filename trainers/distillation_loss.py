"""What a student is asked to match: the teacher's next-token distributions, and its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from molora.errors import ConfigError, MoloraError, Problem

IGNORED = -100

_ROUNDING = 1e-4
"""Relative difference of two ways to the same fp32 logits; 16 bits have their own."""

Head = Callable[[Tensor], Tensor]
"""Makes logits `[T, V]` of hidden states `[T, d]`."""


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """What the student is asked to match, and how much each part counts.

    The loss of a token is `T² KL(teacher ‖ student) + hidden_weight · ‖s − t‖²/‖t‖² + task_weight · CE(label)`. It is
    the mean over all supervised tokens of an optimizer step, or over all real tokens if the data has no labels.

    Attributes:
        temperature: T, divides the logits of both in the first part.
        task_weight: Of the cross-entropy of the labels, which is what `Trainer` and `SFTTrainer` train on alone.
        hidden_weight: Of the relative squared error of hidden states, the mean over `hidden_layers`.
        hidden_layers: `"all"` layers, the `"last"`, or numbers of layers: 0 the embeddings, 1 behind the first layer.
        chunk_tokens: Logits exist for so many tokens at a time, if both heads are plain linears.

    Raises:
        ConfigError: If a value is impossible.
    """

    temperature: float = 1.0
    task_weight: float = 0.0
    hidden_weight: float = 0.0
    hidden_layers: Literal["all", "last"] | tuple[int, ...] = "all"
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.temperature < float("inf"):
            problems.append(Problem("temperature", f"got {self.temperature!r}; must be a number above 0."))
        for name in ("task_weight", "hidden_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                problems.append(Problem(name, f"got {getattr(self, name)!r}; must be a number of at least 0."))
        if self.chunk_tokens < 1:
            problems.append(Problem("chunk_tokens", f"got {self.chunk_tokens!r}; must be at least 1."))
        named = isinstance(self.hidden_layers, str)
        if not self.hidden_layers or (named and self.hidden_layers not in ("all", "last")):
            message = f"got {self.hidden_layers!r}; allowed are 'all', 'last', and numbers of layers, as in (4, 8)."
            problems.append(Problem("hidden_layers", message))
        if problems:
            raise ConfigError(problems, "impossible distillation options")

    def layers(self, number: int) -> list[int]:
        """Resolve `hidden_layers` for a model with so many layers.

        Raises:
            MoloraError: If there is no such layer.
        """
        if isinstance(self.hidden_layers, str):
            return [number] if self.hidden_layers == "last" else list(range(1, number + 1))
        for layer in self.hidden_layers:
            if not 0 <= layer <= number:
                raise MoloraError(f"hidden_layers names {layer}; the model has the layers 0 to {number}.")
        return list(self.hidden_layers)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts at the positions that count, not yet as logits.

    Attributes:
        states: `[T, d]`, or logits `[T, V]` if the head is the identity.
        head: Makes the logits.
    """

    states: Tensor
    head: Head


def supervised(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Find the positions whose prediction counts.

    Args:
        inputs: A batch; `labels` are shifted here, `shift_labels` are shifted already.

    Returns:
        Boolean `[B, S]`: positions that predict a label, or all real tokens if there are no labels; and the labels
        `[B, S]` that the positions predict, or `None`.

    Raises:
        MoloraError: If the batch is not one of a language model.
    """
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise MoloraError(f"distillation reads `input_ids`, and the batch has {', '.join(inputs) or 'nothing'}.")
    shifted = inputs.get("shift_labels")
    labels = inputs.get("labels")
    if shifted is None and labels is not None:
        shifted = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if shifted is not None:
        return shifted != IGNORED, shifted
    mask, ids = inputs.get("attention_mask"), inputs["input_ids"]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.shape != ids.shape else mask.bool()
    return real, None


def sums_of_predictions(
    student: Predictions, teacher: Predictions, labels: Tensor | None, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sum two losses over tokens, with the logits of one chunk of tokens at a time.

    The backward pass makes the logits of each chunk again, so those of all tokens never exist together.

    Args:
        student: Of T tokens.
        teacher: Of the same; gets no gradient.
        labels: `[T]`, or `None` for no second loss.
        temperature: Divides the logits of both.
        chunk_tokens: Tokens of a chunk.

    Returns:
        The sum of `temperature² · KL(teacher ‖ student)`, and that of the cross-entropy of the labels, which is not
        divided by the temperature.
    """
    kl = task = student.states[:0].sum(dtype=_wide(student.states))  # zero, and part of the graph
    for start in range(0, len(student.states), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        own, other = student.states[chunk], teacher.states[chunk]
        wanted = None if labels is None else labels[chunk]
        arguments = (own, student.head, other, teacher.head, wanted, temperature)
        # Nothing random runs in a chunk, so no state of a generator is kept.
        parts = checkpoint(_sums_of_chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
        kl, task = kl + parts[0], task + parts[1]
    return kl, task


def sum_of_hidden_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum `‖s − t‖² / ‖t‖²` over tokens, as the mean over layers.

    Args:
        student: Hidden states of each layer, `[T, d]`.
        teacher: The same of the teacher; gets no gradient.
    """
    errors = [_relative_error(own, other.detach()).sum() for own, other in zip(student, teacher, strict=True)]
    return torch.stack(errors).mean()


def head_of(model: Any) -> Head | None:
    """The linear head of a causal language model; whether it makes the logits alone, `makes_logits` tells.

    Returns:
        `None` if the head is adapted or quantised, or the model has no backbone.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        return None
    return lambda states: head(states.to(head.weight.dtype))


def makes_logits(head: Head, states: Tensor, logits: Tensor) -> bool:
    """Whether a model's logits are its head of its last hidden states, and nothing is done before, between or after.

    Models may transform hidden states before the head, and scale or cap the logits.

    Args:
        head: Its head.
        states: Its last hidden states `[B, S, d]`.
        logits: Its own logits of all tokens or of the last, `[B, S, V]` or `[B, 1, V]`.
    """
    made, own = head(states[:, -1]), logits[:, -1]
    allowed = max(_ROUNDING, torch.finfo(made.dtype).eps)
    made, own = made.to(_wide(made)), own.to(_wide(own))
    return bool((made - own).norm() <= allowed * own.norm())


def same(states: Tensor) -> Tensor:
    """The head of logits."""
    return states


def _sums_of_chunk(
    own: Tensor, own_head: Head, other: Tensor, other_head: Head, labels: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = own_head(own)
    logits = logits.to(_wide(logits))
    with torch.no_grad():
        wanted = other_head(other).to(device=logits.device, dtype=logits.dtype)
        wanted = functional.log_softmax(wanted / temperature, dim=-1)
    found = functional.log_softmax(logits / temperature, dim=-1)
    kl = functional.kl_div(found, wanted, reduction="sum", log_target=True) * temperature**2
    task = kl.new_zeros(()) if labels is None else functional.cross_entropy(logits, labels, reduction="sum")
    return kl, task


def _relative_error(own: Tensor, other: Tensor) -> Tensor:
    """`[T]` of hidden states `[T, d]`."""
    own, other = own.to(_wide(own)), other.to(device=own.device, dtype=_wide(own))
    size = other.square().sum(dim=-1)
    return (own - other).square().sum(dim=-1) / size.clamp(min=torch.finfo(size.dtype).tiny)


def _wide(values: Tensor) -> torch.dtype:
    """At least fp32."""
    return torch.promote_types(values.dtype, torch.float32)
