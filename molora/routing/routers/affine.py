"""Rows and an offset that read a normalised input: what a linear router and a threshold net have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.routing.precision import promote
from molora.routing.routers.base import linear, parameter

NORMS = ("none", "center", "standardize")
"""What is done to a router's input: nothing, its mean subtracted, or divided by its standard deviation too."""


class Affine(nn.Module):
    """`W (x - mean) / std + b` with constant statistics, which is `W' x + b'` to everyone who multiplies.

    The hidden states of a language model share a large common direction, and a few features are a thousand times as
    large as others. Rows that read them raw rank all tokens alike, and the step of an optimizer means something else
    for each feature. The statistics come from one pass over training data (`molora.calibrate_routers`) and never
    depend on a batch. As buffers they are saved with the adapter and stay fp32.

    Args:
        rows: Number of outputs.
        in_features: Size of the input.
        bias: Whether there is a `b`.
        norm: One of `NORMS`.

    Attributes:
        weight: W, `[rows, in]`.
        bias: b, `[rows]`, or `None`.
        input_mean: `[in]`, or `None` without a norm.
        input_std: `[in]`, all ones for `center`; `None` without a norm.
        awaits_data: Whether the module was drawn to be calibrated, and was not yet.
    """

    weight: Tensor
    input_mean: Tensor | None
    input_std: Tensor | None

    def __init__(self, rows: int, in_features: int, bias: bool, norm: str = "none") -> None:
        super().__init__()
        self.weight = parameter(rows, in_features)
        self.bias = parameter(rows) if bias else None
        self.norm = norm
        self.awaits_data = norm != "none"
        for name, start in (("input_mean", torch.zeros), ("input_std", torch.ones)):
            self.register_buffer(name, None if norm == "none" else start(in_features))

    def rows(self) -> Tensor:
        """W', what the raw input is multiplied with, `[rows, in]`.

        Raises:
            MoloraError: In training, if the statistics are still missing.
        """
        if self.input_std is None:
            return self.weight
        if self.awaits_data and self.training and torch.is_grad_enabled():
            raise MoloraError(
                "the routers of this adapter take their start from data, and have seen none: call "
                "molora.calibrate_routers(model, batches) before training. molora's trainers do it by themselves."
            )
        return promote(self.weight) / self.input_std

    def offset(self) -> Tensor | None:
        """b', what is added to the product with the raw input, `[rows]`; `None` for nothing."""
        if self.input_mean is None or self.input_std is None:
            return self.bias
        # In fp32 under autocast too: in 16 bits a token would be routed otherwise in training than later without it.
        common = linear(self.input_mean / self.input_std, promote(self.weight))
        return -common if self.bias is None else promote(self.bias) - common

    def of_few(self, x: Tensor) -> Tensor:
        """The outputs `[..., rows]` of a handful of inputs `[..., in]`, normalising these or W, whichever is less.

        For calls without gradients.
        """
        if self.input_mean is None or self.input_std is None or x.numel() > self.weight.numel():
            return linear(x, self.rows(), self.offset())
        x = promote(x) - self.input_mean
        return linear(x / self.input_std if self.norm == "standardize" else x, self.weight, self.bias)

    def normalized_sums(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Sums of raw inputs as sums of normalised ones.

        Args:
            sums: `[E, in]`.
            counts: How many inputs each is of, `[E]`.
        """
        if self.input_mean is None or self.input_std is None:
            return sums
        return (sums - counts.unsqueeze(-1) * self.input_mean) / self.input_std

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the statistics of data; for `center` the deviation stays one.

        Args:
            mean: `[in]`.
            std: `[in]`, above zero.
        """
        assert self.input_mean is not None
        assert self.input_std is not None
        self.input_mean.copy_(mean)
        if self.norm == "standardize":
            self.input_std.copy_(std)
        self.awaits_data = False

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        mean = state_dict.get(prefix + "input_mean")
        if mean is not None and bool(mean.any()):
            self.awaits_data = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():  # 16 bits cannot tell a mean from its features
            new = self._buffers[name]
            if new is not None and new.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = old.to(new.device)
        return self
