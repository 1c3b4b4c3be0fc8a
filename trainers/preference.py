"""TRL's trainers that learn from preferences, with routing losses."""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer, KTOTrainer, RewardTrainer

from molora.trainers.columns import ColumnCollator
from molora.trainers.mixin import RoutingLossMixin


class _ReferenceColumnsMixin(RoutingLossMixin):
    """`RoutingLossMixin` for trainers that may run the reference over the whole dataset before training."""

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        collator = self.data_collator  # of a loader that the trainer makes itself
        self.data_collator = ColumnCollator(collator)
        try:
            return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]  # TRL's
        finally:
            self.data_collator = collator

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Compute them as the trainer does, with the routing inputs of the batch."""
        self._take(inputs)
        with self._given(inputs):
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]  # TRL's


class MoLoraDPOTrainer(_ReferenceColumnsMixin, DPOTrainer):
    """`trl.DPOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. Both answers of a pair have the
    task of their row. Only passes of the trained adapter count, not those of the reference.
    """


class MoLoraRewardTrainer(RoutingLossMixin, RewardTrainer):
    """`trl.RewardTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(task_type="SEQ_CLS", ...)` or an adapted model. Both
    answers of a pair have the task of their row.
    """


class MoLoraKTOTrainer(_ReferenceColumnsMixin, KTOTrainer):
    """`trl.KTOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. The answers to other prompts by
    which KTO estimates a divergence are routed with the columns of the row whose prompt they follow, and do not count.
    """
