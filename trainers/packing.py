"""Several examples in one row: where each of them lies in a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from molora.errors import MoloraError
from molora.routing.inputs import SCOPE, scopes

SEQ_LENGTHS = "seq_lengths"
"""TRL's column with the length of each example that is packed into a row."""


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a dataset's rows lie in a batch.

    Attributes:
        shape: `[B, S]` of the batch.
        places: Positions of the real tokens among all B·S, in the order of the rows, `[T]`.
        lengths: Tokens of each example, N of them, in the order of the rows.
        examples: How many examples each row of the dataset holds.
        packed: Whether a row of the batch may hold several examples.
    """

    shape: torch.Size
    places: Tensor
    lengths: list[int]
    examples: list[int]
    packed: bool

    def row_lengths(self) -> list[int]:
        """Tokens of each row of the dataset."""
        lengths = iter(self.lengths)
        return [sum(islice(lengths, count)) for count in self.examples]

    def packed_rows(self) -> Tensor:
        """Positions of each example's tokens, `[N, M]`; -1 behind its end."""
        return pad_sequence(list(self.places.split(self.lengths)), batch_first=True, padding_value=-1)

    def at_tokens(self, values: Tensor) -> Tensor:
        """Put a value of each real token, `[T, ...]`, where the token is, `[B, S, ...]`; padding gets zeros."""
        placed = values.new_zeros(self.shape.numel(), *values.shape[1:])
        placed[self.places] = values
        return placed.unflatten(0, self.shape)

    def over_tokens(self, values: Tensor) -> Tensor:
        """Repeat a value of each example, `[N, ...]`, over its tokens, `[T, ...]`."""
        return values.repeat_interleave(torch.tensor(self.lengths), dim=0)

    def over_examples(self, values: Tensor) -> Tensor:
        """Repeat a value of each row of the dataset over the examples in it, `[N, ...]`."""
        return values.repeat_interleave(torch.tensor(self.examples), dim=0)


def layout_of(rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> TokenLayout | None:
    """Find the tokens of rows in the batch that a collator made of them.

    Args:
        rows: Rows of the dataset.
        batch: The batch.

    Returns:
        The layout; `None` if the batch is made of something else than the rows' tokens in their order.

    Raises:
        MoloraError: If packed rows cannot be found again, as one with examples mixed up would go unnoticed.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not all("input_ids" in row for row in rows):
        return None
    by_row = [_example_lengths(row) for row in rows]
    lengths = [length for lengths in by_row for length in lengths]
    total = sum(lengths)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        places = mask.reshape(-1).nonzero().flatten()
    else:  # without a mask only a single row can end in padding
        places = torch.arange(total if len(ids) == 1 else ids.numel())
    packed = len(ids) != len(rows) or any(SEQ_LENGTHS in row for row in rows) or len(lengths) != len(rows)
    if len(places) != total or total > ids.numel():
        if any(SEQ_LENGTHS in row for row in rows):
            raise MoloraError(
                f"the rows of a batch hold {total} tokens by their {SEQ_LENGTHS} and the batch {len(places)}, so the "
                "examples in it cannot be told apart; use a collator that keeps every token."
            )
        return None
    padded = mask is None and total != ids.numel()
    return TokenLayout(ids.shape, places, lengths, [len(row) for row in by_row], packed or padded)


def _example_lengths(row: Mapping[str, Any]) -> list[int]:
    """Lengths of the examples in a row: as TRL says, or between the places where positions start anew."""
    if SEQ_LENGTHS in row:
        return [int(length) for length in row[SEQ_LENGTHS]]
    length = int(torch.as_tensor(row["attention_mask"]).sum()) if "attention_mask" in row else len(row["input_ids"])
    positions = torch.as_tensor(row.get("position_ids", []))
    if positions.ndim != 1 or len(positions) != length:  # none, those of padding too, or positions in images
        return [length]
    starts = (positions.diff() != 1).nonzero().flatten() + 1
    return torch.tensor([0, *starts.tolist(), length]).diff().tolist()


def refuse_packed_sequences(model: nn.Module) -> None:
    """Refuse routers that decide about whole rows, where a row holds several examples.

    Raises:
        MoloraError: If an active adapter has `router_level="sequence"`.
    """
    if not any(scope.always for scope in scopes(model)):
        return
    layers: list[Any] = [module for module in model.modules() if hasattr(module, SCOPE)]
    for layer in layers:
        for name in layer.active_adapters:
            if name in layer.molora_plan and layer.molora_plan[name].level == "sequence":
                raise MoloraError(
                    f"adapter {name!r} has router_level='sequence' and would make one decision for all examples that "
                    "are packed into a row. Train with packing=False and padding_free=False, or route by token."
                )
