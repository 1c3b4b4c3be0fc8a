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

from molora.errors import MoloraError, one_of

VARIABLE = "MOLORA_KERNELS"
BACKENDS = ("auto", "triton", "torch", "reference")
FEW_TOKENS = 8
"""Up to so many tokens, as when decoding, stacking matrices costs more than reading the input once saves."""

MANY_RANKS = 256
"""From so many ranks of one bank on, a single token reads the matrices of its own experts only."""

_logger = logging.getLogger("molora.kernels")


def backend() -> str:
    """What `MOLORA_KERNELS` asks for.

    Raises:
        MoloraError: If it is no name of a backend.
    """
    name = os.environ.get(VARIABLE, "auto")
    if name not in BACKENDS:
        raise MoloraError(f"the environment variable {VARIABLE}: {one_of(name, dict.fromkeys(BACKENDS))}")
    return name


def reason(kernels: str, device: str) -> str:
    """Why the torch form runs.

    Args:
        kernels: What `MOLORA_KERNELS` asks for.
        device: Kind of device.
    """
    if kernels == "torch":
        return f"{VARIABLE}=torch"
    return "no kernel knows this adapter" if device == "cuda" else f"the tensors are on {device}"


@functools.cache
def say(chosen: str, why: str) -> None:
    """Log once which code runs, and why.

    Args:
        chosen: One of `BACKENDS`.
        why: Half a sentence.
    """
    _logger.info("molora multiplies with %r: %s.", chosen, why)
