"""The small modules beside a router: threshold net, balancing bias, blend."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from molora.routing.precision import promote
from molora.routing.routers.affine import Affine
from molora.routing.routers.base import linear, parameter, uniform_


class ThresholdNet(Affine):
    """One threshold logit per token, with bias (AdaMoLE, arXiv 2405.00361, eq. 5).

    Args:
        in_features: Size of the input.
        norm: What is done to the input first, as for the router.
    """

    def __init__(self, in_features: int, norm: str = "none") -> None:
        super().__init__(1, in_features, bias=True, norm=norm)

    def forward(self, x: Tensor | None, product: Tensor | None = None) -> Tensor:
        """Map `[..., in]` to threshold logits `[..., 1]`; with `x Wᵀ` given, `product`, only the bias is added."""
        offset = self.offset()
        assert offset is not None
        if product is not None:
            return product + offset
        assert x is not None
        return linear(x, self.rows(), offset)

    def reset_parameters(self, start: float | None = None) -> None:
        """Draw as `nn.Linear` would: weight and bias uniform in ±1/√in.

        Args:
            start: Share of the largest threshold, in (0, 1), at which that of every token starts instead.
        """
        assert self.bias is not None
        if start is not None:
            nn.init.zeros_(self.weight)
            nn.init.constant_(self.bias, math.log(start / (1 - start)))
            return
        uniform_(self.weight, self.weight.shape[1])
        uniform_(self.bias, self.weight.shape[1])


class BalanceBias(nn.Module):
    """Bias added to the probabilities when experts are ranked (loss-free balancing, arXiv 2408.15664).

    Not trained by gradients: molora's trainers move it after each optimizer step. Always fp32, whatever the model is
    cast to, as its steps are smaller than what 16 bits resolve.

    Args:
        num_experts: E, null experts included.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.weight = parameter(num_experts).requires_grad_(False)

    def forward(self) -> Tensor:
        """Return the bias `[E]`."""
        return self.weight.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BalanceBias:
        before = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype != before.dtype and before.dtype == torch.float32:
            self.weight.data = before.to(self.weight.device)
        return self


class Blend(nn.Module):
    """How much the router counts against external scores, and how much the experts count at all (MoR1E, 2404.08985).

    Both are sigmoids of 100 times a learned number that starts at zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = parameter(1)
        self.output = parameter(1)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the share of the router and the factor of the experts' output, both `[1]`."""
        return torch.sigmoid(100 * promote(self.token)), torch.sigmoid(100 * promote(self.output))
