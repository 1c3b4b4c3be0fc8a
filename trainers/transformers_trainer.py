"""transformers' trainers with routing losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from molora.trainers.columns import COLUMNS
from molora.trainers.mixin import RoutingLossMixin


class MoLoraTrainer(RoutingLossMixin, Trainer):
    """`transformers.Trainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; the model is one that `get_peft_model` adapted.
    """


class MoLoraSeq2SeqTrainer(RoutingLossMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; the model is one that `get_peft_model` adapted. What it generates in evaluation is routed
    with the columns of its rows, by beams too.
    """

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **gen_kwargs: Any
    ) -> Any:
        """Predict as the trainer does, with the routing inputs of the batch."""
        if self.args.predict_with_generate and isinstance(inputs, Mapping):
            # Given to `generate` itself, which repeats them for beams.
            columns = {name: inputs[name] for name in COLUMNS if name in inputs}
            gen_kwargs = {**(gen_kwargs or getattr(self, "_gen_kwargs", {})), **columns}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs)
