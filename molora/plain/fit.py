"""The plain LoRA nearest to a routed one, from second moments: pure functions, nothing of size `[out, in]`.

For one linear, `x` is its input with a constant 1 behind it, `[in + 1]`, and `h` what B is multiplied with, `[C]`: the
adapter adds `B h(x)`. Moments are means over tokens. The best linear map of x with the same B is the least-squares
solution `A* = E[h xᵀ] E[x xᵀ]⁻¹`, as it makes every entry of `h - A x` as small as can be. All in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Sums over the tokens of one part of the calibration data, for one linear.

    Attributes:
        xx: `[in + 1, in + 1]`, of x with itself; the same tensor for linears that read the same input.
        hx: `[C, in + 1]`, of h with x.
        hh: `[C, C]`.
        weights: `[E]`, of the mixing weights, or `[splits, E]`; `None` where there are none.
        count: Tokens.
    """

    xx: Tensor
    hx: Tensor
    hh: Tensor
    weights: Tensor | None
    count: int

    def __add__(self, other: Moments) -> Moments:
        weights = None if self.weights is None or other.weights is None else self.weights + other.weights
        return Moments(self.xx + other.xx, self.hx + other.hx, self.hh + other.hh, weights, self.count + other.count)


def ridge_fit(moments: Moments, ridge: float, prior: Tensor | None = None, bias: bool = False) -> Tensor:
    """The map A that minimises `E|h - A x|² + λ E|x|²/in · |A - prior|²`.

    Args:
        moments: Of the rows to fit.
        ridge: λ, relative to the mean square of an entry of x.
        prior: `[C, in]`, what is believed without data; zero by default.
        bias: Fit a constant too; it is not shrunk.

    Returns:
        `[C, in + 1]`; the last column, the constant, is zero without `bias`.
    """
    size = moments.xx.shape[0] - 1
    used = size + bias
    second = moments.xx[:used, :used] / moments.count
    cross = moments.hx[:, :used] / moments.count
    start = torch.zeros(cross.shape, dtype=second.dtype, device=second.device)
    if prior is not None:
        start[:, :size] = prior.to(start)
    shrink = torch.full(
        (used,), ridge * float(second.diagonal()[:size].mean()), dtype=second.dtype, device=second.device
    )
    shrink[size:] = 0
    solved = torch.cholesky_solve((cross - start @ second).T, _root(second + torch.diag(shrink))).T
    result = torch.zeros(len(cross), size + 1, dtype=second.dtype, device=second.device)
    result[:, :used] = start + solved
    return result


def squared_error(moments: Moments, down: Tensor, up: Tensor, start: Tensor | None = None) -> float:
    """`E|B h - U V x|²` per token, for the map `V = down` and `U = up`.

    Args:
        moments: Of the rows to judge by.
        down: V `[r, in + 1]`.
        up: U `[out, r]`.
        start: B `[out, C]`; U itself by default.
    """
    start = up if start is None else start
    of_target = (start.T @ start) * moments.hh
    of_map = (up.T @ up) * (down @ moments.xx @ down.T)
    between = (start.T @ up) * (moments.hx @ down.T)
    return max(float(of_target.sum() + of_map.sum() - 2 * between.sum()) / max(moments.count, 1), 0.0)


def mean_square(moments: Moments, up: Tensor) -> float:
    """`E|B h|²` per token: what the error is relative to."""
    return float(((up.T @ up) * moments.hh).sum()) / max(moments.count, 1)


@dataclass(frozen=True)
class Truncated:
    """A LoRA of lower rank.

    Attributes:
        down: `[k, in + 1]`.
        up: `[out, k]`.
        energy: `[min(r, in)]`, the share of the mean squared output that the first 1, 2, … ranks keep.
    """

    down: Tensor
    up: Tensor
    energy: Tensor


def truncate(down: Tensor, up: Tensor, second: Tensor, rank: int | None) -> Truncated:
    """The LoRA of lower rank whose output is nearest in the mean over the input's distribution.

    The SVD of `U V S^½` with S the second moments, through the QR of U and a triangular root of S: the product
    `[out, in]` is never formed, and directions in which inputs hardly vary do not count.

    Args:
        down: V `[r, in + 1]`.
        up: U `[out, r]`.
        second: S `[in + 1, in + 1]`, second moments of the input, or their sums.
        rank: k; `None` or at least r only tells the energy.
    """
    root = _root(second)
    basis, small = torch.linalg.qr(up)
    left, singular, right = torch.linalg.svd(small @ down @ root, full_matrices=False)
    energy = singular.square().cumsum(0) / singular.square().sum().clamp_min(torch.finfo(singular.dtype).tiny)
    if rank is None or rank >= len(down):
        return Truncated(down, up, energy)
    balance = singular[:rank].sqrt()
    # X = right · root⁻¹; the root is lower triangular.
    rows = torch.linalg.solve_triangular(root, right[:rank], upper=False, left=False)
    return Truncated(balance.unsqueeze(1) * rows, basis @ left[:, :rank] * balance, energy)


def truncate_unweighted(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The LoRA of lower rank nearest in the Frobenius norm of `U V`: what is best without data.

    Args:
        down: V `[r, in]`.
        up: U `[out, r]`.
        rank: k; at least r leaves both as they are.
    """
    if rank >= len(down):
        return down, up
    basis, small = torch.linalg.qr(up.double())
    rows, small_rows = torch.linalg.qr(down.double().T)
    left, singular, right = torch.linalg.svd(small @ small_rows.T)
    balance = singular[:rank].sqrt()
    return (
        (balance.unsqueeze(1) * right[:rank] @ rows.T).to(down.dtype),
        (basis @ left[:, :rank] * balance).to(up.dtype),
    )


def relative_error(down: Tensor, up: Tensor, whole_down: Tensor, whole_up: Tensor) -> float:
    """`‖U V - B A‖² / ‖B A‖²` without forming either product."""
    downs, ups = torch.cat([down, whole_down]), torch.cat([up, -whole_up], dim=1)
    difference = ((ups.T @ ups) * (downs @ downs.T)).sum()
    whole = ((whole_up.T @ whole_up) * (whole_down @ whole_down.T)).sum()
    return float(difference / whole.clamp_min(1e-30))


def _root(second: Tensor) -> Tensor:
    """A lower triangular `L` with `L Lᵀ = S`, of a slightly fuller S where S itself is not positive definite.

    Sums of products in fp32 have eigenvalues below zero by about 1e-7 of the largest.
    """
    least = torch.finfo(second.dtype).eps * len(second) * second.diagonal().max().clamp_min(1e-30)
    eye = torch.eye(len(second), dtype=second.dtype, device=second.device)
    for step in range(14):
        root, info = torch.linalg.cholesky_ex(second + eye * least * 10**step)
        if not int(info):
            return root
    raise ValueError("the second moments of a linear's input are not finite; is the model's output?")
