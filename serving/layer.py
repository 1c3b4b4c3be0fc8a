"""What a linear of vLLM multiplies its LoRAs with: vLLM's own wrapper, and the routing between A and B."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA

Gate = Any
"""A `molora.serving.gate.Gate`; molora is imported when the first mixture is."""


class SlotTokens:
    """Which tokens of a step are in which slot: found once for all linears, when the first one asks.

    Args:
        wrapper: vLLM's wrapper, which is told the slots of every step.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._found: dict[int, list[tuple[int, Tensor]]] = {}
        update = wrapper.update_metadata

        def update_metadata(*args: Any, **kwargs: Any) -> Any:
            self._found.clear()
            return update(*args, **kwargs)

        wrapper.update_metadata = update_metadata

    def of(self, tokens: int) -> list[tuple[int, Tensor]]:
        """Each slot in use, with the indices of its tokens; those without an adapter are in none."""
        if tokens not in self._found:
            self._found[tokens] = tokens_by_slot(self._wrapper.token_lora_indices[:tokens])
        return self._found[tokens]


def tokens_by_slot(slots: Tensor) -> list[tuple[int, Tensor]]:
    """From the slot of every token, -1 for none, to the tokens of every slot, in the order in which tokens need them.

    Processes that share a model may have an adapter in different slots, and have to reduce its products at one time.
    """
    return [(slot, (slots == slot).nonzero().squeeze(1)) for slot in dict.fromkeys(slots.tolist()) if slot >= 0]


class RoutedWrapper:
    """Stands before the wrapper that all linears share, for one of them.

    Args:
        wrapper: vLLM's, which knows the slot of every token.
        layer: The linear.
        tokens: What the linears of one wrapper share, on a CPU.
    """

    def __init__(self, wrapper: Any, layer: Any, tokens: SlotTokens) -> None:
        self.wrapper = wrapper
        self.tokens = tokens
        slots, _, _, self.max_rank = layer.lora_b_stacked[0].shape
        self.slices = len(layer.lora_b_stacked)
        self.sizes = tuple(getattr(layer, "output_sizes", None) or layer.output_slices)
        self.gates: list[list[Gate | None]] = [[None] * self.slices for _ in range(slots)]
        self.rows = [[0] * self.slices for _ in range(slots)]
        # Under tensor parallelism such a linear sees a part of its input, and so a part of every product.
        self.partial = isinstance(layer, RowParallelLinearWithLoRA) and layer.tp_size > 1
        self.tables = None
        if layer.device.type == "cuda":
            from molora.serving.op import route_ranks
            from molora.serving.tables import SlotTables

            self._route = route_ranks
            self.tables = SlotTables(self.slices, slots, self.max_rank, device=layer.device)
            for slot, index in itertools.product(range(slots), range(self.slices)):
                self.tables.write(slot, index, None)

    def __getattr__(self, name: str) -> Any:
        if name == "wrapper" or name.startswith("__"):  # while it is being copied, there is none yet
            raise AttributeError(name)
        return getattr(self.wrapper, name)

    def why_not(self, gate: Gate) -> str | None:
        """Why a gate cannot be served here, or `None`."""
        if self.partial and gate.input_scale is not None:
            return "its router normalises an input that tensor parallelism divides; set tensor_parallel_size=1."
        if self.tables is not None:
            reason: str | None = self.tables.why_not(gate)
            return reason
        return None

    def fill(self, slot: int, weights: Any, gates: list[Gate | None]) -> None:
        """Say what a slot holds from now on.

        Args:
            slot: Its index.
            weights: vLLM's `LoRALayerWeights`, one or packed of several, or `None` if it leaves this linear alone.
            gates: For each matrix; `None` for a plain LoRA.
        """
        downs, ups = _listed(weights, "lora_a"), _listed(weights, "lora_b")
        for index, member in enumerate(self._members(ups)):
            down = None if member is None else downs[member]
            gate = None if member is None or down is None else gates[member]
            changed = gate is not None or self.gates[slot][index] is not None
            self.gates[slot][index] = gate
            self.rows[slot][index] = 0 if down is None else len(down)
            if self.tables is not None and changed:
                self.tables.write(slot, index, gate)

    def _members(self, ups: list[Tensor | None]) -> list[int | None]:
        """Which of an adapter's matrices each slice is of; one may cover several, spread as vLLM does."""
        if len(ups) < 2:
            return [0 if ups else None] * self.slices
        if len(ups) == self.slices:
            return list(range(self.slices))
        found: list[int | None] = []
        for member, up in enumerate(ups):
            # How much a missing one covers is not known: all that is left.
            rows = sum(self.sizes[len(found) :]) if up is None else len(up)
            while rows > 0 and len(found) < self.slices:
                rows -= self.sizes[len(found)]
                found.append(member)
        return found

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add every token's adapter to y `[T, out]`, in place; see vLLM's method of this name."""
        x, y = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.tables is None:
            self._by_slot(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, add_inputs)
            return
        buffer = torch.empty(self.slices, len(x), self.max_rank, dtype=torch.float32, device=x.device)
        self.wrapper.add_shrink(buffer, x, lora_a_stacked, scale, **kwargs)
        products = tensor_model_parallel_all_reduce(buffer.clone()) if self.partial else buffer
        self._route(buffer, products, x, self.wrapper._token_lora_indices, self.tables)
        self.wrapper.add_expand(y, buffer, lora_b_stacked, output_slices, add_inputs=add_inputs, **kwargs)

    def _by_slot(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        add_inputs: bool,
    ) -> None:
        """The plain form, adapter by adapter.

        vLLM 0.32's own for CPUs copies the weights for every token, and gives tokens without an adapter that of the
        last slot, since -1 is the last index.
        """
        for slot, of_slot in self.tokens.of(len(x)):
            tokens, begin = x[of_slot].float(), 0
            for index, width in enumerate(output_slices):
                rows, end = self.rows[slot][index], begin + width
                if rows:
                    down, up = lora_a_stacked[index][slot, 0, :rows], lora_b_stacked[index][slot, 0, :width]
                    hidden = self._gated(tokens @ down.float().T * scale, tokens, self.gates[slot][index])
                    added = hidden @ up[:, : hidden.shape[1]].float().T
                    before = y[of_slot, begin:end] if add_inputs else 0.0
                    y[of_slot, begin:end] = (before + added).to(y.dtype)
                begin = end

    def _gated(self, products: Tensor, x: Tensor, gate: Gate | None) -> Tensor:
        """The ranks' products `[T, rows]` times what their experts count, `[T, R]`."""
        if gate is None:
            return products
        from molora.serving.gate import rank_gate

        whole = products
        if self.partial:
            # Only what routes has to be whole; B is multiplied with parts, whose sum the linear takes.
            first = gate.rank if gate.logit_rows else 0
            # A copy, for on CPUs the sum is written over what is given.
            summed = tensor_model_parallel_all_reduce(products[:, first:].clone())
            whole = torch.cat([products[:, :first], summed], dim=1)
        return products[:, : gate.rank] * rank_gate(whole, gate, x)


def _listed(weights: Any, name: str) -> list[Tensor | None]:
    """The matrices of vLLM's weights for a linear, of which there may be one, several or none."""
    found = None if weights is None else getattr(weights, name)
    return found if isinstance(found, list) else [] if found is None else [found]
