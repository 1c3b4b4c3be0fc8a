"""Routers that read the features of a token or a sequence."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora.routing.precision import full_precision, promote
from molora.routing.routers.affine import Affine
from molora.routing.routers.base import ROUTER_INITS, Router, RouterInput, RouterSize, linear, parameter, uniform_


def _features(given: RouterInput) -> Tensor:
    assert given.x is not None
    return promote(given.x)


class LinearRouter(Affine, Router):
    """One logit per expert, `logits = x Wᵀ (+ b)`, of the input as it is or normalised by constant statistics."""

    has_rows: ClassVar[bool] = True
    takes_product: ClassVar[bool] = True

    def __init__(self, size: RouterSize) -> None:
        super().__init__(size.num_experts, size.in_features, size.bias, size.norm)

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        offset = self.offset()
        if given.product is not None:
            return given.product if offset is None else given.product + offset
        return linear(_features(given), self.rows(), offset)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw the rows as asked; a bias starts as `nn.Linear`'s does, or at zero with `zeros`."""
        ROUTER_INITS[init](self.weight, init_range)
        if self.bias is not None:
            uniform_(self.bias, self.weight.shape[1]) if init == "kaiming_uniform" else nn.init.zeros_(self.bias)


class ArrowRouter(LinearRouter):
    """`|x · p_e|` with one prototype per expert, made from its weights (Arrow, arXiv 2405.11157)."""

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        return super().logits(given).abs()


class PrototypeRouter(LinearRouter):
    """Correlation of the standardised input with each standardised prototype (PHATGOOSE, arXiv 2402.05859).

    `logits_e = LN(x) · LN(v_e) / √in`, LN without scale and shift.
    """

    takes_product: ClassVar[bool] = False

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        x, size = _features(given), self.weight.shape[1:]
        rows = F.layer_norm(self.weight.to(x.dtype), size)
        return linear(F.layer_norm(x, size), rows) / math.sqrt(size[0])


class CosineRouter(Router):
    """Cosine between the input and one prototype per expert, over a learned temperature (X-MoE, arXiv 2204.09179).

    With `router_dim` the input is projected to that many dimensions first. The temperature starts at 0.07.
    """

    has_rows: ClassVar[bool] = True

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        self.projection = parameter(size.dim, size.in_features) if size.dim else None
        self.weight = parameter(size.num_experts, size.dim or size.in_features)
        self.log_temperature = parameter(1)

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        x = _features(given)
        if self.projection is not None:
            x = linear(x, self.projection)
        cosine = linear(F.normalize(x, dim=-1), F.normalize(self.weight.to(x.dtype), dim=-1))
        # Clamped as in Tutel: logits beyond 100 would only saturate the gate.
        return cosine * (-self.log_temperature.to(x.dtype)).exp().clamp(max=100.0)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw prototypes and projection; the temperature starts at 0.07."""
        ROUTER_INITS[init](self.weight, init_range)
        if self.projection is not None:
            uniform_(self.projection, self.projection.shape[1])
        nn.init.constant_(self.log_temperature, math.log(0.07))


class MlpRouter(Router):
    """Two layers: `logits = W relu(W_in x + b_in) + b`, `router_dim` wide."""

    has_rows: ClassVar[bool] = True
    default_dim: ClassVar[int | None] = 64

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        assert size.dim is not None
        self.weight_in = parameter(size.dim, size.in_features)
        self.bias_in = parameter(size.dim)
        self.weight = parameter(size.num_experts, size.dim)
        self.bias = parameter(size.num_experts)

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        hidden = F.relu(linear(_features(given), self.weight_in, self.bias_in))
        return linear(hidden, self.weight, self.bias)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw both layers; the biases as `nn.Linear`'s."""
        ROUTER_INITS[init](self.weight, init_range)
        for weight in (self.weight_in, self.bias_in):
            uniform_(weight, self.weight_in.shape[1])
        uniform_(self.bias, self.weight.shape[1])


class NormalizedRouter(Router):
    """Both sides layer-normed, each with a learned scale (SMEAR, arXiv 2306.03745).

    `logits = (s_x ⊙ LN(x)) (s_w ⊙ LN(W))ᵀ + b`. The scales start at 0.01, so that routing starts even.
    """

    has_rows: ClassVar[bool] = True

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        self.weight = parameter(size.num_experts, size.in_features)
        self.bias = parameter(size.num_experts)
        self.input_scale = parameter(size.in_features)
        self.weight_scale = parameter(size.in_features)

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        x, size = _features(given), self.weight.shape[1:]
        x = F.layer_norm(x, size, self.input_scale.to(x.dtype))
        rows = F.layer_norm(self.weight.to(x.dtype), size, self.weight_scale.to(x.dtype))
        return linear(x, rows, self.bias)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw the rows; scales 0.01, bias 0."""
        ROUTER_INITS[init](self.weight, init_range)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.input_scale, 0.01)
        nn.init.constant_(self.weight_scale, 0.01)


class RecurrentRouter(Router):
    """A GRU that runs over the layers: `h_l = GRU(P_l x_l, h_{l-1})`, `logits_l = W_l h_l` (RMoE, arXiv 2408.06793).

    Differs from the authors' code: every layer has a GRU of its own here; share it with `router_sharing="weights"`.
    """

    has_rows: ClassVar[bool] = True
    reads: ClassVar[str] = "input+state"
    default_dim: ClassVar[int | None] = 64

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        assert size.dim is not None
        self.projection = parameter(size.dim, size.in_features)
        self.weight_ih = parameter(3 * size.dim, size.dim)
        self.weight_hh = parameter(3 * size.dim, size.dim)
        self.bias_ih = parameter(3 * size.dim)
        self.bias_hh = parameter(3 * size.dim)
        self.weight = parameter(size.num_experts, size.dim)

    def logits(self, given: RouterInput) -> tuple[Tensor, Tensor]:
        """Map `[..., in]` and the state `[..., h]` to logits `[..., E]` and the state for the next layer."""
        x = linear(_features(given), self.projection)
        state = x.new_zeros(x.shape) if given.state is None else given.state.to(x.dtype)
        weights = [w.to(x.dtype) for w in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]
        with full_precision(x):
            new = torch.gru_cell(x.flatten(0, -2), state.flatten(0, -2), *weights).reshape(x.shape)
        return linear(new, self.weight), new

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Draw everything as `nn.GRU` and `nn.Linear` do, the rows of the logits as asked."""
        ROUTER_INITS[init](self.weight, init_range)
        uniform_(self.projection, self.projection.shape[1])
        for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh):
            uniform_(weight, self.weight_hh.shape[1])
