"""Linears that read the same input, such as q, k and v: what they multiply it with is multiplied at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Names of linears that, side by side in one block, read the same input, in transformers' models."""

_CROSS_ATTENTION = ("cross", "encdec", "encoder_attn")
"""In the name of a block whose queries read something else than its keys and values."""


def input_of(key: str) -> tuple[str, ...]:
    """What a module reads, as a name: modules with equal ones read the same input.

    Args:
        key: Full name of the module.

    Returns:
        The parent's name and the siblings' ones, or only the module's own.
    """
    parent, _, name = key.rpartition(".")
    for names in SIBLINGS:
        if name in names:
            if any(word in parent.lower() for word in _CROSS_ATTENTION):
                names = names[1:] if name != names[0] else names[:1]
            return (parent, *names)
    return (key,)


class SharedInput:
    """The modules of one adapter that read the same input, and what the first of them computed for the others.

    Only ever a shortcut: a module that does not find its part, because it was called with another tensor or alone,
    computes it. A part is kept until it is taken, or the next call of the first module.

    Attributes:
        members: The modules (`MoLoraLayer`) in the order of the model.
    """

    def __init__(self) -> None:
        self.members: list[Any] = []
        self._x: weakref.ref[Tensor] | None = None
        self._state: tuple[int, bool] = (0, False)
        self._parts: dict[int, Any] = {}

    def put(self, x: Tensor, parts: dict[int, Any]) -> None:
        """Keep what was computed from `x` for the modules with these ids."""
        self._x, self._state, self._parts = weakref.ref(x), _state(x), parts

    def take(self, module: Any, x: Tensor) -> Any:
        """The part of a module for the very same `x`, or `None`."""
        if not self._parts:
            return None
        if self._x is None or self._x() is not x or self._state != _state(x):
            self._parts = {}
            return None
        return self._parts.pop(id(module), None)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a graph cannot be copied, and the copy computes its own.
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)
        self.members = state["members"]


def _state(x: Tensor) -> tuple[int, bool]:
    """What tells an unchanged tensor; inference tensors count no changes, as they take part in no graph."""
    return (0 if x.is_inference() else x._version), torch.is_grad_enabled()
