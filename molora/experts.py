"""The expert bank of one module: which rank belongs to which expert, at which scale, and the matrices themselves."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def lora_scale(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """`lora_alpha / r`, or `lora_alpha / √r` for rank-stabilised LoRA (arXiv 2312.03732); 0 for rank 0."""
    if not r:
        return 0.0
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class BankWeight(nn.Module):
    """One packed matrix of a bank, held as `.weight`.

    A module and not a bare parameter, so that its name is `molora_A.<adapter>.weight`: TRL copies adapters by looking
    for `.<adapter>.` in names, and FSDP wraps modules that own a `.weight`, whose values then only exist during their
    own forward. So does CPU offloading: multiply by calling the module, or
    read its weight where `molora.held.at_hand` says that it is there.
    """

    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor | None) -> Tensor:
        """Multiply `[..., columns]` to `[..., rows]`; for `None` give a copy of the matrix."""
        return self.matrix().clone() if x is None else F.linear(x, self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix."""
        return self.weight.dtype

    def matrix(self) -> Tensor:
        """The matrix as a whole, `[rows, columns]`."""
        return self.weight

    def extra_repr(self) -> str:
        """Show the shape in `print(model)`."""
        return str(tuple(self.weight.shape))


class SplitDown(BankWeight):
    """A matrix A whose input is cut into equal parts, each multiplied on its own (MHR, arXiv 2211.03831)."""

    def __init__(self, rows: int, columns: int, num_splits: int) -> None:
        super().__init__(rows, columns)
        self.num_splits = num_splits

    def forward(self, x: Tensor | None) -> Tensor:
        """Multiply `[..., columns]` part by part to `[..., splits, rows]`; for `None` give a copy of the matrix."""
        if x is None:
            return super().forward(None)
        parts = self.weight.unflatten(1, (self.num_splits, -1))
        return torch.einsum("...qi,rqi->...qr", x.unflatten(-1, (self.num_splits, -1)), parts)


class SplitUp(BankWeight):
    """A matrix B whose output is made of equal parts, each from a hidden of its own (MHR, arXiv 2211.03831)."""

    def __init__(self, rows: int, columns: int, num_splits: int) -> None:
        super().__init__(rows, columns)
        self.num_splits = num_splits

    def forward(self, x: Tensor | None) -> Tensor:
        """Multiply `[..., splits, columns]` part by part to `[..., rows]`; for `None` give a copy of the matrix."""
        if x is None:
            return super().forward(None)
        parts = self.weight.unflatten(0, (self.num_splits, -1))
        return torch.einsum("...qr,qor->...qo", x, parts).flatten(-2)


class ShardPool(nn.Module):
    """The pools that all modules of one kind draw the shards of their vectors from (MoS, arXiv 2410.00938).

    Args:
        shards: Shards in each pool, private ones last.
        in_size: Length of a shard of A's rows.
        out_size: Length of a shard of B's columns.
    """

    def __init__(self, shards: int, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weight_A = nn.Parameter(torch.zeros(shards, in_size))
        self.weight_B = nn.Parameter(torch.zeros(shards, out_size))

    def forward(self, index: Tensor, kind: str) -> Tensor:
        """Put vectors together: index `[r, n]` to `[r, n · size]`."""
        return F.embedding(index, self.weight_A if kind == "A" else self.weight_B).flatten(1)


class ShardedWeight(nn.Module):
    """A matrix without parameters of its own: an index into a pool that another module may hold.

    Args:
        pool: The pool; not registered here, so that it is saved once.
        kind: `A`, whose rows are put together, or `B`, whose columns are.
        index: `[r, n]`, which shards make up each vector.
    """

    index: Tensor

    def __init__(self, pool: ShardPool, kind: str, index: Tensor) -> None:
        super().__init__()
        self._pool = (pool,)  # in a tuple, where torch does not register it
        self.kind = kind
        self.register_buffer("index", index)

    def forward(self, x: Tensor | None) -> Tensor:
        """Multiply by the matrix: `[..., in]` to `[..., r]` for A, `[..., r]` to `[..., out]` for B."""
        return self.matrix() if x is None else F.linear(x, self.matrix())

    @property
    def pool(self) -> ShardPool:
        """The pool the vectors are drawn from."""
        return self._pool[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the pool."""
        return self.pool.weight_A.dtype

    def matrix(self) -> Tensor:
        """The matrix as a whole, `[r, in]` for A, `[out, r]` for B."""
        vectors = self.pool(self.index, self.kind)
        return vectors if self.kind == "A" else vectors.T


def shard_index(
    key: str, r: int, private_rank: int, num_shards: int, shards: int, position: int, of_kind: int
) -> Tensor:
    """Choose the shards of one matrix: its own private ones first, then public ones at random (arXiv 2410.00938).

    Args:
        key: Name of the matrix; the choice is a function of it, the same in every run.
        r: Vectors of the matrix.
        private_rank: Vectors made of shards that no other matrix uses.
        num_shards: Shards per vector.
        shards: Shards in the pool; the last `private_rank * num_shards * of_kind` are private.
        position: Place of the module among those of its kind.
        of_kind: Modules of its kind.

    Returns:
        `[r, num_shards]`, int64.
    """
    own = private_rank * num_shards
    public = shards - own * of_kind
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    private = public + position * own + torch.arange(own, device="cpu").reshape(private_rank, num_shards)
    drawn = torch.randint(max(public, 1), (r - private_rank, num_shards), generator=generator, device="cpu")
    return torch.cat([private, drawn])


class RankMap(nn.Module):
    """Rank → expert map and per-rank scale of one bank.

    Constants of the configuration: never trained, never in a checkpoint, never rounded by `model.to(dtype)`.

    Args:
        ranks: Rank of each expert, in expert order; experts may differ, and have none.
        scales: Scale of each expert.
    """

    expert: Tensor
    scale: Tensor
    scale_of_expert: Tensor

    def __init__(self, ranks: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self.ranks = tuple(ranks)
        self.scales = tuple(scales)
        self._equal_ranks, self._equal_scales = len(set(self.ranks)) == 1, len(set(self.scales)) == 1
        self._equal = self._equal_ranks and self._equal_scales
        self._fill(torch.device("cpu"))

    def _fill(self, device: torch.device) -> None:
        of_rank = [expert for expert, rank in enumerate(self.ranks) for _ in range(rank)]
        scales = [self.scales[expert] for expert in of_rank]
        self.register_buffer("expert", torch.tensor(of_rank, device=device, dtype=torch.long), persistent=False)
        self.register_buffer("scale", torch.tensor(scales, device=device), persistent=False)
        self.register_buffer("scale_of_expert", torch.tensor(self.scales, device=device), persistent=False)

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
        return weights[..., self.expert] * self.rank_scale(weights)

    def spread(self, weights: Tensor) -> tuple[float | Tensor, int]:
        """How weights are spread: each expert's scale, a number or `[E]`, and the rank of all, 0 if they differ."""
        scale = self.scales[0] if self._equal_scales else self._in_dtype(self.scale_of_expert, weights)
        return scale, self.ranks[0] if self._equal_ranks else 0

    def rank_scale(self, weights: Tensor) -> Tensor:
        """Scale of each rank, `[R]`, in the precision of `weights`."""
        return self._in_dtype(self.scale, weights)

    def scaled(self, weights: Tensor) -> Tensor:
        """Multiply each expert's scale into its weight, `[..., E]`."""
        return weights * (self.scales[0] if self._equal else self._in_dtype(self.scale_of_expert, weights))

    def _in_dtype(self, scale: Tensor, weights: Tensor) -> Tensor:
        if weights.dtype != torch.float64:
            return scale
        # Rare, and for tests: the buffers are fp32, as not every device knows fp64.
        exact = self.scales if scale is self.scale_of_expert else [self.scales[e] for e in self.expert.tolist()]
        return torch.tensor(exact, dtype=torch.float64, device=weights.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RankMap:
        # Filled anew rather than moved: a cast would round the scale, and the meta device would lose both for good, as
        # no checkpoint brings them back.
        super()._apply(fn, recurse)
        self._fill(torch.device("cpu") if self.expert.is_meta else self.expert.device)
        return self


@torch.no_grad()
def init_down(lora_a: Tensor, init: str, init_range: float, density: float) -> None:
    """Draw A `[R, in]`.

    Args:
        lora_a: Filled in place.
        init: `kaiming_uniform` as PEFT's LoRA; `normal`; `orthogonal`, as long as those of `kaiming_uniform` and at
            right angles to each other, as far as there is room, so that no expert reads what another one does;
            `sparse_normal` leaves all but a random share of each row
            zero and draws those from N(0, 1/R²) (FlyLoRA, arXiv 2510.08396).
        init_range: Standard deviation of `normal`.
        density: Share of each row that `sparse_normal` fills.
    """
    if not lora_a.numel():
        return
    if init == "kaiming_uniform":
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    elif init == "normal":
        nn.init.normal_(lora_a, std=init_range)
    elif init == "orthogonal":
        nn.init.orthogonal_(lora_a, gain=3**-0.5)
    else:
        rows, columns = lora_a.shape
        kept = torch.rand(rows, columns, device=lora_a.device).topk(max(1, round(columns * density)), dim=1).indices
        nn.init.zeros_(lora_a).scatter_(1, kept, torch.randn(kept.shape, device=lora_a.device).to(lora_a) / rows)


@torch.no_grad()
def init_up(lora_b: Tensor, blocks: Sequence[int], init_weights: bool) -> None:
    """Draw B `[out, R]` expert by expert, so that each starts as a LoRA of its own rank would.

    Args:
        lora_b: Filled in place: zeros for an exact identity, else kaiming-uniform per expert.
        blocks: Columns of each expert.
        init_weights: `True` leaves the base model's output unchanged; `False` is for tests.
    """
    nn.init.zeros_(lora_b)
    for block in lora_b.split(list(blocks), dim=1):
        if not init_weights and block.numel():
            block.copy_(nn.init.kaiming_uniform_(torch.empty_like(block), a=math.sqrt(5)))
