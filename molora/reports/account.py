"""What an adapter takes: parameters, bytes on disk, and memory on a server."""

from __future__ import annotations

from collections import Counter

import torch

from molora.errors import ConfigError
from molora.parameters import count_by_kind, kind_of
from molora.reports.data import Account
from molora.serving.ranks import check_servable, packed_rows, rank_for_vllm
from molora.slim.adapter import Adapter
from molora.writing import size

_BANKS = ("experts, ", "frozen experts, ", "pools")


def account_of(adapter: Adapter, base: int | None) -> Account:
    """Parameters by kind, bytes by purpose, and what vLLM would keep for it.

    Args:
        adapter: The adapter.
        base: Parameters of the base model, if known.
    """
    numbers = [(name, tensor) for name, tensor in adapter.tensors.items() if tensor.is_floating_point()]
    held: Counter[str] = Counter()
    for name, tensor in adapter.tensors.items():
        held[_purpose(kind_of(name))] += tensor.numel() * tensor.element_size()
    order = [name for name in ("bank of experts", "routers", "everything else") if name in held]
    serving, refused = _on_servers(adapter)
    return Account(
        count_by_kind(numbers),
        {**{name: held[name] for name in order}, "all": held.total()},
        base,
        serving,
        refused,
    )


def _purpose(kind: str) -> str:
    if kind.startswith(_BANKS):
        return "bank of experts"
    return "everything else" if kind == "fully trained modules" else "routers"


def _on_servers(adapter: Adapter) -> tuple[dict[str, str], str]:
    facts = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        try:
            check_servable("the adapter", adapter)
            rank = max(packed_rows(adapter.plan(module), dtype) for module in adapter.modules)
            room = rank_for_vllm(rank)
        except ConfigError as error:
            return {}, " ".join(problem.message for problem in error.problems)
        facts[f"rank in {name}"] = f"{rank}, needs max_lora_rank {room}"
        shapes = [_shape(adapter, module) for module in adapter.modules]
        if None not in shapes:
            taken = sum(sum(shape) for shape in shapes if shape is not None) * room * dtype.itemsize
            facts[f"memory of one place for an adapter, {name}"] = size(taken)
    return facts, ""


def _shape(adapter: Adapter, module: str) -> tuple[int, int] | None:
    """Inputs and outputs of a module; `None` if they do not show, as its matrices are drawn from pools."""
    down, up = (
        next((found for name in names if (found := adapter.tensor(module, f"{name}.weight")) is not None), None)
        for names in (("molora_A", "molora_frozen_A"), ("molora_B", "molora_frozen_B"))
    )
    return None if down is None or up is None else (down.shape[1], up.shape[0])
