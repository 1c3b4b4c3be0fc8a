"""Do the Triton kernels work on this device? Asked once for each device and dtype, before they are used unasked.

They are compiled on the user's machine, by a driver and a compiler and for a device that nobody tested together. A
small mixture is computed both ways, forward and backward; if the kernels fail or disagree, the torch form runs, and a
warning says why.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from molora.kernels.choices import Choices
from molora.kernels.fused import mixture

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}
KERNEL_DTYPES = frozenset(_TOLERANCES)
"""What the kernels multiply in."""

_logger = logging.getLogger("molora.kernels")


@torch.compiler.assume_constant_result
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give what the torch form gives.

    Args:
        device: Where.
        dtype: Of the input and the experts.
    """
    return _works(device, dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    if dtype not in KERNEL_DTYPES:
        return False
    try:
        with torch.enable_grad():
            found, expected = (_results(device, dtype, backend) for backend in ("triton", "torch"))
    except Exception as error:  # whatever a compiler, a driver or a library may raise
        reason = f"{type(error).__name__}: {error}"
    else:
        errors = [_error(a, b) for a, b in zip(found, expected, strict=True)]
        if max(errors) <= _TOLERANCES[dtype]:
            return True
        reason = f"they differ from the torch form by up to {max(errors):.1e}, relative, in {dtype}"
    _logger.warning(
        "molora's Triton kernels do not work on %s (%s), so the torch form runs, which is right and slower. "
        "MOLORA_KERNELS=triton insists on them, MOLORA_KERNELS=torch leaves out this check.",
        device,
        reason,
    )
    return False


def _results(device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Output and gradients of four experts of rank 4 and a shared one, on 40 tokens. Touches no random state."""
    tokens, size, out, experts, ranks = 40, 64, 80, 4, 20

    def wave(rows: int, columns: int, step: float) -> Tensor:
        values = torch.arange(rows * columns, device=device, dtype=torch.float32).mul_(step).sin_()
        return values.view(rows, columns).to(dtype)

    leaves = [wave(tokens, size, 0.7), wave(ranks, size, 1.3), wave(experts, size, 2.1)]
    leaves.append(wave(out, ranks, 0.9))
    x, down, router, up = (leaf.requires_grad_() for leaf in leaves)
    y = wave(tokens, out, 0.3)
    choices = Choices("softmax", "top_k", renormalize=True, top_k=2, temperature=8.0, shared_experts=1)
    result = mixture(x, y, down, router, up, scale=0.5, choices=choices, backend=backend)
    grads = torch.autograd.grad(result.y, [x, down, router, up], wave(tokens, out, 1.7))
    return [result.y, *grads]


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().float(), expected.detach().float()
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")
