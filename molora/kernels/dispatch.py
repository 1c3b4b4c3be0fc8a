"""Which code multiplies: one table, and an environment variable that overrules it.

| `MOLORA_KERNELS` | what runs | for |
|---|---|---|
| `reference` | `kernels/reference.py`: two products and a gate, in torch's autograd | what no other can do |
| `torch` | `kernels/stacked.py`: one read of the input, backward by hand | CPUs, and GPUs for what has no kernel |
| `triton` | `kernels/fused.py`, `kernels/triton/` | GPUs, for the choices in `kernels/choices.py` |
| `auto` | the first of triton, torch, reference that can do it | the default |

`molora.kernels` says once, on its logger, what runs for which reason.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from molora.errors import MoloraError, one_of

VARIABLE = "MOLORA_KERNELS"
BACKENDS = ("auto", "triton", "torch", "reference")
FEW_TOKENS = 64
"""Up to so many tokens, stacking matrices costs more than reading the input once saves, if there are no gradients.
Forward passes of a model of width 1024 on a CPU, times that of a plain LoRA of rank 16: 1.11 without stacking and 1.27
with it for 16 tokens, 1.09 and 1.16 for 64; no difference was to be seen for 512."""

FEW_IN_TRAINING = 8
"""The same in training mode: enough for rollouts, and less than a batch. Reentrant checkpointing runs a layer without
gradients first and with them again, and both should round alike."""

FEW_EXPERTS = 4
"""Up to so many chosen experts, reading theirs alone takes fewer steps than it saves."""

SPARED_RANKS = 32
"""From so many ranks on that a token did not choose, it reads the matrices of its own experts only. Measured for fp32
matrices of width 1024 and 2816 that come from memory, 8 experts of rank 8: 128 against 167 microseconds."""

_logger = logging.getLogger("molora.kernels")


_asked: str | None = None
"""What was asked for last; `None` before the first question."""


def backend() -> str:
    """What `MOLORA_KERNELS` asked for when the first linear ran, or what was chosen since.

    Raises:
        MoloraError: If it is no name of a backend.
    """
    return choose(os.environ.get(VARIABLE, "auto")) if _asked is None else _asked


def choose(name: str) -> str:
    """Overrule `MOLORA_KERNELS` from now on.

    Args:
        name: One of `BACKENDS`.

    Returns:
        The name.

    Raises:
        MoloraError: If it is no name of a backend.
    """
    global _asked
    if name not in BACKENDS:
        raise MoloraError(f"kernels, as in the environment variable {VARIABLE}: {one_of(name, BACKENDS)}")
    _asked = name
    return name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Overrule `MOLORA_KERNELS` inside a block.

    Args:
        name: One of `BACKENDS`.
    """
    global _asked
    before = _asked
    choose(name)
    try:
        yield
    finally:
        _asked = before


def reason(kernels: str, device: str) -> str:
    """Why the torch form runs.

    Args:
        kernels: What `MOLORA_KERNELS` asks for.
        device: Kind of device.
    """
    if kernels == "torch":
        return f"{VARIABLE}=torch"
    return "no kernel knows this adapter, or none works here" if device == "cuda" else f"the tensors are on {device}"


@functools.cache
def say(chosen: str, why: str) -> None:
    """Log once which code runs, and why.

    Args:
        chosen: One of `BACKENDS`.
        why: Half a sentence.
    """
    _logger.info("molora multiplies with %r: %s.", chosen, why)
