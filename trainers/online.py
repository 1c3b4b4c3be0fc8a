"""TRL's trainers that learn from their own answers, with routing losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from molora.errors import MoloraError
from molora.routing.inputs import SCOPE, routing_inputs
from molora.trainers.columns import COLUMNS, EXPERT_SCORES, PROMPT_MASK, TASK_IDS, is_per_token
from molora.trainers.mixin import RoutingLossMixin


class OnlineColumnsMixin(RoutingLossMixin):
    """`RoutingLossMixin` for trainers whose batches are made of what the model answers to the rows.

    Generation and the passes about the answers find the routing columns of their rows, and the batch keeps them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._of_rows: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        self._refuse_other_engines()

    def _refuse_other_engines(self) -> None:
        trainer: Any = self
        layers: list[Any] = [module for module in trainer.model.modules() if hasattr(module, SCOPE)]
        plans = [plan for layer in layers for plan in layer.molora_plan.values()]
        if getattr(trainer, "use_vllm", False) and any(plan.reads for plan in plans):
            raise MoloraError(
                "use_vllm=True generates with merged weights, and an adapter that routes cannot be merged. Set "
                "use_vllm=False, or train a mixture with fixed weights (preset 'static')."
            )
        by_row = any(plan.per_sequence and plan.reads for plan in plans)
        if getattr(trainer, "use_transformers_continuous_batching", False) and by_row:
            raise MoloraError(
                "use_transformers_continuous_batching=True generates several answers in one row, and this adapter "
                "routes by row. Set it to False, or route by token."
            )

    def _generate_and_score_completions(self, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        trainer: Any = super()
        columns = {name: values.to(self.accelerator.device) for name, values in _columns_of(inputs).items()}
        self._of_rows = columns
        try:
            with routing_inputs(self.model, **columns) if columns else nullcontext():
                output = trainer._generate_and_score_completions(inputs)
        finally:
            self._of_rows = {}
        # Behind all else: TRL reads the number of rows off the first value.
        return {**output, **columns}

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        trainer: Any = super()
        columns = self._of_rows or {name: self._columns[name] for name in COLUMNS if name in self._columns}
        by_chunk = _ByChunk(model, self.model, columns) if columns else model
        return trainer._get_per_token_logps_and_entropies(by_chunk, *args, **kwargs)


class _ByChunk:
    """A model that is called with some rows of a batch at a time, in order, each with its own routing columns.

    Args:
        model: The model to call; it may be wrapped, or a reference model.
        adapted: The model with the layers that read the columns.
        columns: Values of every row of the batch.
    """

    def __init__(self, model: Any, adapted: Any, columns: Mapping[str, Tensor]) -> None:
        self._model, self._adapted, self._columns = model, adapted, columns
        self._next = 0

    def __call__(self, **inputs: Any) -> Any:
        rows = slice(self._next, self._next + len(inputs["input_ids"]))
        self._next = rows.stop
        with routing_inputs(self._adapted, **{name: values[rows] for name, values in self._columns.items()}):
            return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The routing columns of rows that are not tokenized yet."""
    columns = {}
    for name in COLUMNS:
        values = [row[name] for row in rows if row.get(name) is not None]
        if not values:
            continue
        if len(values) != len(rows):
            raise MoloraError(f"some rows have a {name} column and {len(rows) - len(values)} in this batch have none.")
        if name == PROMPT_MASK or is_per_token(name, values[0]):
            raise MoloraError(
                f"the {name} column has a value per token, and the trainer makes the tokens itself. "
                + ("Leave it out: prompts are known here." if name == PROMPT_MASK else "Give one value per row.")
            )
        columns[name] = torch.tensor(values, dtype={TASK_IDS: torch.long, EXPERT_SCORES: torch.float32}[name])
    return columns


class MoLoraGRPOTrainer(OnlineColumnsMixin, GRPOTrainer):
    """`trl.GRPOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. Every answer has the routing
    columns of its row, while it is generated too. Only the passes that are trained on count.

    Raises:
        MoloraError: If another engine shall generate that cannot route.
    """


class MoLoraRLOOTrainer(OnlineColumnsMixin, RLOOTrainer):
    """`trl.RLOOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. Every answer has the routing
    columns of its row, while it is generated too. Only the passes that are trained on count.

    Raises:
        MoloraError: If another engine shall generate that cannot route.
    """
