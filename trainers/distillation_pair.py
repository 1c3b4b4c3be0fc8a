"""Student and teacher: whether they go together, and how each is run over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.likelihood import last_logits_only
from molora.trainers.column_mixin import RoutingColumnsMixin

_NOT_FOR_THE_MODEL = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class Pass:
    """What one side gave for a batch.

    Attributes:
        outputs: Of the model; its logits may be those of the last token only.
        backbone: Of the part below the head, with `last_hidden_state` `[B, S, d]`.
    """

    outputs: Any
    backbone: Any


class TeacherColumns(RoutingColumnsMixin):
    """Gives the routing columns of a batch to another model than the trainer's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @contextmanager
    def given(self, columns: Mapping[str, Tensor], inputs: Any) -> Iterator[None]:
        """A block in which the model's layers find the columns that were taken out of a batch."""
        self._take(dict(columns), new=True)
        with self._given(inputs):
            yield


def causal_model(model: Any) -> Any:
    """The language model with its head, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def run_batch(model: Any, causal: Any, inputs: Mapping[str, Any], *, whole: bool, hidden: bool) -> Pass:
    """Run a model over a batch without its labels.

    Args:
        model: As it is to be called.
        causal: The language model inside it.
        inputs: The batch.
        whole: Make all logits, not only those of the last token.
        hidden: Ask for the hidden states of all layers.
    """
    given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
    given["use_cache"] = False
    if hidden:
        given["output_hidden_states"] = True
    if not whole:
        given |= last_logits_only(causal)
    seen: list[Any] = []
    # What a model returns itself is converted to fp32 under mixed precision; what its backbone returns is not.
    handle = causal.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        outputs = model(**given)
    finally:
        handle.remove()
    return Pass(outputs, seen[-1])  # a router that reads the base model asks the backbone before


def check_pair(student: Any, teacher: Any) -> None:
    """Refuse two models that cannot be compared.

    Raises:
        MoloraError: Saying which of them, and why.
    """
    sizes = []
    for side, model in (("student", causal_model(student)), ("teacher", causal_model(teacher))):
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_output_embeddings") or config.is_encoder_decoder:
            raise MoloraError(f"the {side} must be a decoder-only language model, got {type(model).__name__}.")
        sizes.append(config.get_text_config().vocab_size)
    if sizes[0] != sizes[1]:
        raise MoloraError(
            f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}; their vocabularies must be the same."
        )


def check_hidden(own: Any, other: Any) -> None:
    """Refuse hidden states `[B, S, d]` of two models that differ in depth or width.

    Raises:
        MoloraError: Saying what differs.
    """
    if own is None or other is None:
        raise MoloraError("hidden_weight needs hidden states, and the model gives none; set it to 0.")
    if len(own) != len(other) or own[-1].shape != other[-1].shape:
        raise MoloraError(
            f"hidden_weight compares layer by layer: the student has {len(own) - 1} layers of width "
            f"{own[-1].shape[-1]}, the teacher {len(other) - 1} of width {other[-1].shape[-1]}; set it to 0."
        )


def move_to(teacher: nn.Module, device: torch.device) -> None:
    """Bring a teacher that lies on one other device to the student's."""
    places = {parameter.device for parameter in teacher.parameters()}
    if len(places) == 1 and places != {device} and getattr(teacher, "hf_device_map", None) is None:
        teacher.to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which a model is in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
