from __future__ import annotations

from typing import Any


def mos() -> dict[str, Any]:
    """No routing: A and B of all layers are put together from shards of common pools, by a fixed random index.

    MoS, Mixture of Shards (arXiv 2410.00938): `y = W0 x + (α/r) B A x`, row i of A being the concatenation of l shards
    of the pool of its kind of linear, column i of B likewise of another pool, by an index of its own; some shards are
    private to one linear. Merging and export as a plain LoRA are exact.

    `r=16` is the rank of A and B, `pool_rank=4` the rank of a LoRA with as many parameters, `num_shards=2` is l, and
    `private_rank=1` the ranks with shards of their own. Alpha 16 is the authors'; the other numbers are examples, as
    theirs change with the budget.
    Unverified, as the module itself is not in what was stored: the initialisation. Here pool A is drawn as LoRA's A
    and pool B is zero; theirs can scale each vector at random. Their save path is written for one model's sizes, ours
    not.
    """
    return {
        "num_experts": 1,
        "r": 16,
        "lora_alpha": 16,
        "expert_layout": "shards",
        "pool_rank": 4,
        "private_rank": 1,
        "num_shards": 2,
        "router": "none",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }
