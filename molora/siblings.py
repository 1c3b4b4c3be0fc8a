"""Linears that read the same input, such as q, k and v: what they multiply it with is multiplied at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molora.routing.precision import compute_dtype

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

_CROSS_ATTENTION = ("cross", "encdec", "encoder_attn", "encoder_decoder", "perceiver", "resampler")
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

    A module takes its part only for the very same tensor, unchanged, with its matrices unchanged, in the same mode and
    the same piece of a checkpointed model; otherwise it computes it. Parts that nobody takes are dropped at the end of
    the model's call.

    Attributes:
        members: The modules (`MoLoraLayer`) in the order of the model.
    """

    def __init__(self) -> None:
        self.members: list[Any] = []
        self._kept: tuple[weakref.ref[Tensor], Any, dict[int, Any]] | None = None

    def put(self, x: Tensor, parts: dict[int, tuple[Callable[[Tensor], Any], Sequence[Tensor]]]) -> None:
        """Keep what was computed from `x`: for the ids of modules what gives their part, and the matrices it is of."""
        versions = {key: (part, [(m, m._version) for m in matrices]) for key, (part, matrices) in parts.items()}
        self._kept = (weakref.ref(x), _state(x), versions)

    def take(self, module: Any, x: Tensor) -> Any:
        """The part of a module for the very same `x`, or `None`."""
        kept = self._kept  # read once: another thread may run the same model
        if kept is None or x.is_inference():
            return None
        known, state, parts = kept
        part, versions = parts.pop(id(module), (None, ()))
        if not parts:
            self._kept = None
        if part is None or known() is not x or state != _state(x):
            return None
        return part(x) if all(matrix._version == version for matrix, version in versions) else None

    def drop(self) -> None:
        """Forget what nobody took."""
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a graph cannot be copied, and the copy computes its own.
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)
        self.members = state["members"]


def _state(x: Tensor) -> tuple[Any, ...]:
    """What has to be the same for a part to be what a module would compute."""
    # Checkpointed pieces of a model are computed again one by one: none may lean on another.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    piece = None if hooks is None else id(hooks[0])
    return x._version, torch.is_grad_enabled(), piece, compute_dtype(x, x.dtype)
