"""The gates of one linear of a server, slot by slot: tensors for a kernel that stay where captured graphs read them.

A slot holds one adapter. A linear has one slice or several, outputs that read the same input, such as q, k and v; each
has a gate of its own. Writing a slot copies two short rows to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.kernels.rank_codes import (
    GATE_CODES,
    INPUT_SCALE_CODES,
    INTEGER_PLACES,
    INTEGERS,
    MOST_LOGITS,
    NUMBERS,
    OFF,
    PLAIN,
    ROUTED,
    SELECTION_CODES,
    SOURCE_CODES,
    WEIGHT_CODES,
    row_widths,
)
from molora.serving.gate import ACTIVATIONS, Gate

Slot = Gate | Literal["off"] | None
"""What one slice of a linear gets from a slot: a gate, nothing (all rank rows zero), or a plain LoRA (`None`)."""


class SlotTables:
    """What every slot does in one linear.

    All slots start as off. The last one, behind those of adapters, is for tokens without an adapter and stays so.

    Args:
        slices: N, outputs of the linear that share an input.
        slots: Adapters that the server holds at once.
        ranks: R, the packed rows that a slot has room for.
        experts: E, the most logits that a gate may have: a power of two up to 128. By default as many as fit into R.
        device: Where the tables are.

    Attributes:
        gates: What was written, by slice and slot; `reference` takes it.
        ints: `[N, slots + 1, ...]` int32, columns as in `molora.kernels.rank_codes`.
        numbers: `[N, slots + 1, ...]` fp32, likewise.
    """

    def __init__(
        self, slices: int, slots: int, ranks: int, experts: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        if experts is None:
            experts = min(MOST_LOGITS, 1 << (ranks - 1).bit_length())
        if experts < 1 or experts > MOST_LOGITS or experts & (experts - 1):
            raise MoloraError(
                f"experts of the slot tables: got {experts}; allowed are powers of two from 1 to {MOST_LOGITS}. "
                "Take the next one above the most logits that a mixture has."
            )
        self.slices, self.slots, self.ranks, self.experts = slices, slots, ranks, experts
        ints, numbers = row_widths(experts, ranks)
        self.ints = torch.zeros(slices, slots + 1, ints, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(slices, slots + 1, numbers, dtype=torch.float32, device=device)
        self.gates: list[list[Slot]] = [["off"] * slots for _ in range(slices)]

    def write(self, slot: int, index: int, gate: Slot) -> None:
        """Say what a slot does to one slice.

        Args:
            slot: Its number.
            index: Number of the slice.
            gate: A mixture's; `None` for a plain LoRA, whose rank rows stay as they are; `"off"` for nothing at all,
                which writes zeros.

        Raises:
            MoloraError: If there is no such slot or slice, or no room for the gate.
        """
        for name, given, count in (("slot", slot, self.slots), ("slice", index, self.slices)):
            if not 0 <= given < count:
                raise MoloraError(f"{name} of the slot tables: got {given}; allowed are 0 to {count - 1}.")
        if isinstance(gate, Gate):
            if problem := self.why_not(gate):
                raise MoloraError(problem)
        elif gate not in (None, "off"):
            raise MoloraError(f"gate of the slot tables: got {gate!r}; allowed are a Gate, None and 'off'.")
        ints, numbers = _rows(gate, self.experts, self.ranks)
        self.ints[index, slot].copy_(ints)
        self.numbers[index, slot].copy_(numbers)
        self.gates[index][slot] = gate

    def why_not(self, gate: Gate) -> str | None:
        """Why a gate cannot be written here, in a sentence; `None` if it can."""
        if gate.rows > self.ranks:
            return (
                f"the mixture packs {gate.rows} rows ({gate.rank} of experts), and a slot has room for {self.ranks}; "
                "start the server with a higher maximal rank."
            )
        return why_not(gate, self.experts)


def why_not(gate: Gate, experts: int) -> str | None:
    """What the kernel cannot express about a gate, in a sentence; `None` if it can.

    Args:
        gate: Any.
        experts: The most logits of the tables.
    """
    spec = gate.spec
    if gate.logits > experts:
        return (
            f"the mixture routes among {gate.logits} experts, and the kernel's tables have room for {experts} "
            f"(at most {MOST_LOGITS})."
        )
    for field, given, allowed in (
        ("gate", spec.gate, GATE_CODES),
        ("selection", spec.selection, SELECTION_CODES),
        ("weights", spec.weights, WEIGHT_CODES),
        ("shared_weight", spec.shared_weight, ("one", "remainder")),
    ):
        if given not in allowed:
            return f"the kernel does not know {field}={given!r}; it knows {', '.join(map(repr, allowed))}."
    if spec.score_weight is not None:
        return "the mixture adds outside scores to its logits (`score_weight`), and the kernel is given none."
    routed = len(gate.ranks) - spec.shared_experts
    if gate.logits - spec.null_experts != routed:
        return (
            f"the gate has {gate.logits} logits, {spec.null_experts} of them for null experts, and {routed} experts "
            "that are not shared; these have to match."
        )
    if gate.source in ACTIVATIONS[:2] and gate.logits != gate.rank:
        return f"source={gate.source!r} takes each rank for an expert; got {gate.rank} ranks and {gate.logits} logits."
    if gate.source == ACTIVATIONS[2] and gate.offset is not None:
        return f"source={gate.source!r} has no offset, and the gate has one."
    if gate.source in ACTIVATIONS and gate.input_scale is not None:
        return f"source={gate.source!r} reads products with A as they are; it has no input_scale."
    return None


def _rows(gate: Slot, experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The two rows of a slot, on the CPU; what a gate does not have is zero, whatever was there before."""
    if not isinstance(gate, Gate):
        wide_ints, wide_numbers = row_widths(experts, ranks)
        row = torch.zeros(wide_ints, dtype=torch.int32, device="cpu")
        row[INTEGER_PLACES["mode"]] = OFF if gate == "off" else PLAIN
        return row, torch.zeros(wide_numbers, device="cpu")
    of_logit = gate.ranks[: gate.logits]
    firsts = [sum(gate.ranks[:expert]) for expert in range(len(of_logit))]
    named = _integers(gate)
    whole = [
        *(named[name] for name in INTEGERS),
        *_padded(firsts, experts),
        *_padded(of_logit, experts),
        *_padded(gate.rank_map.expert.tolist(), ranks),
    ]
    numbers = _numbers(gate)
    pieces = [
        torch.tensor([numbers[name] for name in NUMBERS], dtype=torch.float32, device="cpu"),
        _filled(gate.offset, experts),
        _filled(gate.balance, experts),
        _filled(gate.rank_map.scale, ranks),
    ]
    return torch.tensor(whole, dtype=torch.int32, device="cpu"), torch.cat(pieces)


def _integers(gate: Gate) -> dict[str, int]:
    spec = gate.spec
    return {
        "mode": ROUTED,
        "rank": gate.rank,
        "logits": gate.logits,
        "null": spec.null_experts,
        "first": gate.rank if gate.logit_rows else 0,
        "rows": gate.router_rows,
        "parts": gate.parts,
        "learned": int(gate.has_threshold),
        "source": SOURCE_CODES[gate.source],
        "input_scale": INPUT_SCALE_CODES[gate.input_scale],
        "normed": int(spec.logit_norm is not None),
        "gate": GATE_CODES[spec.gate],
        "selection": SELECTION_CODES[spec.selection],
        "top_k": spec.top_k,
        "groups": spec.expert_groups,
        "weights": WEIGHT_CODES[spec.weights],
        "renormalize": int(spec.renormalize),
        "remainder": int(spec.shared_weight == "remainder"),
    }


def _numbers(gate: Gate) -> dict[str, float]:
    spec = gate.spec
    return {
        "gate_temperature": 1.0 if spec.gate == "relaxed_bernoulli" else spec.temperature,
        "temperature": spec.temperature,
        "level": spec.threshold,
        "max_threshold": spec.max_threshold,
        "threshold_offset": 0.0 if gate.threshold_offset is None else gate.threshold_offset.item(),
        "top_p": spec.top_p,
        "top_gap": spec.top_gap,
        "min_logit": float("-inf") if spec.min_logit is None else spec.min_logit,
        "logit_norm": spec.logit_norm or 0.0,
        "reach": 2 * spec.router_jitter,
    }


def _padded(values: Sequence[int], length: int) -> list[int]:
    return [*values, *[0] * (length - len(values))]


def _filled(values: Tensor | None, length: int) -> Tensor:
    """Values in front, zeros behind: `[length]` fp32."""
    row = torch.zeros(length, device="cpu")
    if values is not None:
        row[: values.numel()] = values.detach().float().cpu().reshape(-1)
    return row
