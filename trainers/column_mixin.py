"""`RoutingColumnsMixin`: the way of the routing columns from the dataset to the layers, in any trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from molora.routing.inputs import routing_inputs, scopes
from molora.routing.scope import RoutingInputs, RoutingScope
from molora.trainers.columns import (
    COLUMNS,
    PACKED_ROWS,
    PROMPT_MASK,
    TASK_IDS,
    TASKS_OF_TOKENS,
    ColumnCollator,
    prompt_of_batch,
    take_columns,
)
from molora.trainers.packing import refuse_packed_sequences


class RoutingColumnsMixin:
    """Columns `task_ids`, `expert_scores` and `prompt_mask` reach the routing, and not the base model.

    In training and in evaluation. Part of `RoutingLossMixin`.

    Attributes:
        task_ids: Tasks of the current batch, `[B]`, or `[N]` where N examples are packed into its rows; `None` if the
            data has no such column.
        packed_rows: For each of these N examples the positions of its tokens in the flattened batch, `[N, M]`, -1
            behind its end; `None` if every row is one example.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.task_ids: Tensor | None = None
        self.packed_rows: Tensor | None = None
        self._columns: dict[str, Tensor] = {}
        self._evaluation: ExitStack | None = None
        self._prepared: Any = None
        super().__init__(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]  # the trainer this is mixed into
        known = self._signature_columns
        self._signature_columns = [*known, *(name for name in COLUMNS if name not in known)]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Most collators drop or choke on columns they do not know. Wrapped here and not for good, because trainers
        # ask what kind of collator they have.
        collator = self.data_collator
        self.data_collator = ColumnCollator(collator)
        try:
            return super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]  # the trainer this is mixed into
        finally:
            self.data_collator = collator

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as the trainer does, with the routing inputs of the batch."""
        with ExitStack() as self._evaluation:
            try:
                return super().prediction_step(*args, **kwargs)  # type: ignore[misc]
            finally:
                self._evaluation = None

    def _prepare_inputs(self, inputs: Any) -> Any:
        inputs = super()._prepare_inputs(inputs)  # type: ignore[misc]  # the trainer this is mixed into
        if type(inputs) is dict:  # a trainer may hand out the same batch again, which must still have its columns
            inputs = dict(inputs)
        self.task_ids, self.packed_rows, self._columns = None, None, {}
        self._prepared = inputs
        self._take(inputs)
        if self._evaluation is not None:  # the model may be called without `compute_loss`
            self._evaluation.enter_context(self._given(inputs))
        return inputs

    def _take(self, inputs: Any, new: bool = False) -> None:
        """Take the routing columns out of a batch, and keep them until the next one, or forget those of the last."""
        columns = take_columns(inputs)
        if columns or new:
            self._columns = columns
            self.task_ids, self.packed_rows = columns.get(TASK_IDS), columns.get(PACKED_ROWS)

    @contextmanager
    def _given(self, inputs: Any) -> Iterator[None]:
        """A block in which the layers find the routing columns of a batch."""
        given: dict[str, Any] = {name: value for name, value in self._columns.items() if name in COLUMNS}
        found = scopes(self.model)
        if self.packed_rows is not None:
            refuse_packed_sequences(self.model)
        # Checking a mask waits for the device, so none is given where nothing reads it. An encoder-decoder's labels
        # belong to other tokens.
        elif any(scope.always for scope in found) and not getattr(self.model.config, "is_encoder_decoder", False):
            prompt = prompt_of_batch(inputs)
            if prompt is not None:
                given.setdefault(PROMPT_MASK, prompt)
        with ExitStack() as block:
            if given and found:
                block.enter_context(routing_inputs(self.model, **given))
            if TASKS_OF_TOKENS in self._columns:
                block.enter_context(_of_tokens(found, self._columns[TASKS_OF_TOKENS]))
            yield


@contextmanager
def _of_tokens(found: Sequence[RoutingScope], task_ids: Tensor) -> Iterator[None]:
    """Let routers read the task of each token, `[B, S]`, in place of those of rows."""
    with ExitStack() as block:
        for scope in found:
            inputs = replace(scope.inputs or RoutingInputs(), task_ids=task_ids)
            block.enter_context(scope.given(inputs, scope.kept))
        yield
