"""What the products for batches of many adapters need of each."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AdapterParts(NamedTuple):
    """What one adapter has at one linear.

    Attributes:
        a: `[R, in]`, in the dtype of the input.
        router: `[E, in]`.
        b: `[out, R]`, in the dtype of the input.
        scale: Factor of its output.
        router_bias: `[E]`.
        threshold_row: `[1, in]`, the threshold net; needed by `adaptive_threshold` and ignored by other selections.
        threshold_bias: `[1]`.
        stacked: `[A; router; threshold row]`, the last if the selection needs it, if the caller keeps them that way.
            Used where all of `x` is multiplied in its dtype.
    """

    a: Tensor
    router: Tensor
    b: Tensor
    scale: float
    router_bias: Tensor | None = None
    threshold_row: Tensor | None = None
    threshold_bias: Tensor | None = None
    stacked: Tensor | None = None
