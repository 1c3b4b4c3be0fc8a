"""An adapted linear as the one pair of matrices that a server of LoRAs multiplies with, and the gate between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.errors import MoloraError
from molora.routing.precision import promote
from molora.serving.gate import ACTIVATIONS, MAGNITUDE, NORMALIZE, ROWS, STANDARDIZE, Gate

PARTS = {torch.float32: 1, torch.bfloat16: 3, torch.float16: 2}
"""Into how many numbers of the served precision a value of a router is split, so that their sum is the value; in fp16
up to 3e-8, for which it has no numbers."""

_SOURCES = {"linear": ROWS, "prototype": ROWS, "cosine": ROWS, "arrow": MAGNITUDE} | {
    name: name for name in ACTIVATIONS
}
_INPUT_SCALES = {"prototype": STANDARDIZE, "cosine": NORMALIZE}


@dataclass(frozen=True, eq=False)
class Packed:
    """One linear of an adapter, for a server.

    Attributes:
        a: `[rows, in]`, in the served precision: A, and what routes.
        b: `[out, rows]`, zero where `a` routes.
        gate: How to weigh the ranks; `None` for a plain LoRA, whose scale is in `b`.
    """

    a: Tensor
    b: Tensor
    gate: Gate | None = None

    @property
    def rows(self) -> int:
        """The rank that a server has to have room for."""
        return len(self.a)


@torch.no_grad()
def pack(layer: Any, adapter_name: str, dtype: torch.dtype) -> Packed:
    """Pack one linear. What cannot be expressed is for `molora.serving.refusals` to say.

    Args:
        layer: The adapted linear.
        adapter_name: Name of its adapter.
        dtype: The served precision.

    Raises:
        MoloraError: If values leave the range of `dtype`.
    """
    plan = layer.molora_plan[adapter_name]
    if plan.is_constant:
        a, b = layer.constant_factors(adapter_name)
        return _checked(Packed(a.to(dtype), b.to(dtype)), layer.module_key, dtype)
    a, b = _by_expert(plan, *(promote(matrix.detach()) for matrix in layer.matrices(adapter_name)))
    gate, rows = _gate(layer, adapter_name, a, dtype)
    a = torch.cat([a.to(dtype), *(split(rows, dtype, gate.parts) if rows is not None else ())])
    return _checked(Packed(a, F.pad(b.to(dtype), (0, len(a) - b.shape[1])), gate), layer.module_key, dtype)


def split(values: Tensor, dtype: torch.dtype, parts: int) -> list[Tensor]:
    """Numbers of a precision whose sum is the values, the largest first.

    Args:
        values: Of any shape, fp32.
        dtype: Of the parts.
        parts: How many.
    """
    found: list[Tensor] = []
    rest = values
    for _ in range(parts):
        found.append(rest.to(dtype))
        rest = rest - found[-1].float()
    return found


def _by_expert(plan: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B with rows and columns for every expert of its own, whatever they share."""
    if plan.layout == "shared_A":
        return a.repeat(plan.bank_experts, 1), b
    if plan.layout == "pairs":
        rows, columns = len(a), b.shape[1]
        return a.repeat_interleave(columns, dim=0), b.repeat(1, rows)
    return a, b


def _gate(layer: Any, name: str, a: Tensor, dtype: torch.dtype) -> tuple[Gate, Tensor | None]:
    """The gate, and the rows behind those of the experts, `[n, in]` fp32."""
    plan, router = layer.molora_plan[name], layer.router_of(name)
    group = layer.molora_group.get(name)
    decider = layer if group is None or not group.decides_once else group.leader
    source, parts = _SOURCES[plan.router], PARTS[dtype]
    if source in ACTIVATIONS:
        rows, offset = a, None
        if plan.spec.selection != "adaptive_threshold" and torch.equal(a.to(dtype).float(), a.float()):
            parts = 1  # nothing is lost: logits are `A x` itself
    else:
        rows, offset = _router_rows(plan.router, router)
    nets = decider.molora_threshold
    threshold = nets[name] if name in nets else None  # noqa: SIM401  # a ModuleDict has no get
    bias = decider.molora_bias[name]() if name in decider.molora_bias else None
    gate = Gate(
        spec=layer.molora_spec[name],
        ranks=layer.molora_ranks[name].ranks,
        scales=layer.molora_ranks[name].scales,
        logits=plan.num_experts + plan.spec.null_experts,
        source=source,
        parts=parts,
        input_scale=_INPUT_SCALES.get(plan.router),
        offset=None if offset is None else offset.float().clone(),
        threshold_offset=None if threshold is None else threshold.offset().float().clone(),
        balance=None if bias is None else bias.float().clone(),
    )
    behind = [rows.float()] if gate.logit_rows else []
    if threshold is not None:
        behind.append(threshold.rows().float())
    return gate, torch.cat(behind) if behind else None


def _router_rows(kind: str, router: Any) -> tuple[Tensor, Tensor | None]:
    """What the raw input is multiplied with for logits, `[logits, in]`, and what is added to the products."""
    if kind == "prototype":
        size = router.weight.shape[1:]
        return F.layer_norm(promote(router.weight), size) / size[0] ** 0.5, None
    if kind == "cosine":
        sharpness = (-promote(router.log_temperature)).exp().clamp(max=100.0)
        return F.normalize(promote(router.weight), dim=-1) * sharpness, None
    return promote(router.rows()), router.offset()


def _checked(packed: Packed, module: str, dtype: torch.dtype) -> Packed:
    if not (packed.a.isfinite().all() and packed.b.isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        remedy = "serve it in bfloat16 or float32" if dtype == torch.float16 else "was its training stable?"
        raise MoloraError(f"{module} has values that are not finite in {name}; {remedy}")
    return packed
