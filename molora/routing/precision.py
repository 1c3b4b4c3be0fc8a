"""The precision of routing: at least fp32, so that near-ties between experts fall the same way everywhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def promote(x: Tensor) -> Tensor:
    """Cast 16-bit values to fp32; fp32 and fp64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_enabled(x: Tensor) -> bool:
    """Whether products of `x` run under autocast; the meta device knows none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def compute_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a product of `x` is computed that is `dtype` without autocast, which leaves fp64 alone."""
    return torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) and x.dtype != torch.float64 else dtype


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A block in which autocast leaves products alone."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()
