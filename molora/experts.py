"""The expert bank of one linear: which rank belongs to which expert, at which scale, and how it is initialised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def expert_ranks(r: int | Sequence[int], num_experts: int) -> tuple[int, ...]:
    """Ranks of all experts; one number means the same rank for each."""
    return (r,) * num_experts if isinstance(r, int) else tuple(r)


def lora_scale(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """`lora_alpha / r`, or `lora_alpha / √r` for rank-stabilised LoRA (arXiv 2312.03732)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class BankWeight(nn.Module):
    """One packed matrix of a bank, held as `.weight`.

    A module and not a bare parameter, so that its name is `molora_A.<adapter>.weight`: TRL copies adapters by looking
    for `.<adapter>.` in names, and FSDP wraps modules that own a `.weight`, whose values then only exist during their
    own forward. So does CPU offloading: multiply by calling the module, never by reading its weight.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply `[..., columns]` to `[..., rows]`."""
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        """Show the shape in `print(model)`."""
        return str(tuple(self.weight.shape))


class RankMap(nn.Module):
    """Rank → expert map and per-rank scale of one bank.

    Constants of the configuration: never trained, never in a checkpoint, never rounded by `model.to(dtype)`.

    Args:
        ranks: Rank of each expert, in expert order; experts may differ.
        scales: Scale of each expert.
    """

    expert: Tensor
    scale: Tensor

    def __init__(self, ranks: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.scales = tuple(scales)
        self._equal = len(set(self.ranks)) == 1 and len(set(self.scales)) == 1
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        of_rank = [expert for expert, rank in enumerate(self.ranks) for _ in range(rank)]
        scales = [self.scales[expert] for expert in of_rank]
        self.register_buffer("expert", torch.tensor(of_rank, device=device), persistent=False)
        self.register_buffer("scale", torch.tensor(scales, device=device), persistent=False)

    @property
    def total_rank(self) -> int:
        """R, the sum of the experts' ranks."""
        return sum(self.ranks)

    def forward(self, weights: Tensor | None) -> Tensor | float:
        """Spread expert weights over their ranks and multiply the scale in.

        Args:
            weights: Mixing weights `[..., E]`; `None` means one for every expert.

        Returns:
            `rank_gate`: `[..., R]`, or a number when every rank has the same gate.
        """
        if weights is None:
            return self.scales[0] if self._equal else self.scale
        if self._equal:
            # A plain repeat: its backward is a sum, deterministic where that of an index is not.
            return weights.repeat_interleave(self.ranks[0], dim=-1) * self.scales[0]
        return weights[..., self.expert] * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankMap:
        # Filled anew rather than moved: a cast would round the scale, and the meta device would lose both for good, as
        # no checkpoint brings them back.
        super()._apply(fn, recurse)
        self._fill(torch.device("cpu") if self.expert.is_meta else self.expert.device)
        return self


@torch.no_grad()
def init_bank(lora_a: Tensor, lora_b: Tensor, ranks: Sequence[int], init_weights: bool) -> None:
    """Draw a bank expert by expert, so that each starts as a LoRA of its own rank would.

    Args:
        lora_a: `[R, in]`, drawn kaiming-uniform as in PEFT's LoRA.
        lora_b: `[out, R]`: zeros for an exact identity, else kaiming-uniform per expert.
        ranks: Rank of each expert.
        init_weights: `True` leaves the base model's output unchanged; `False` is for tests.
    """
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    if init_weights:
        nn.init.zeros_(lora_b)
        return
    for block in lora_b.split(list(ranks), dim=1):
        block.copy_(nn.init.kaiming_uniform_(torch.empty_like(block), a=math.sqrt(5)))
