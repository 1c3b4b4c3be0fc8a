"""TRL's trainers that learn from preferences, with routing losses."""

from trl import DPOTrainer, KTOTrainer, RewardTrainer

from molora.trainers.mixin import RoutingLossMixin


class MoLoraDPOTrainer(RoutingLossMixin, DPOTrainer):
    """`trl.DPOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. Both answers of a pair have the
    task of their row. Only passes of the trained adapter count, not those of the reference.
    """


class MoLoraRewardTrainer(RoutingLossMixin, RewardTrainer):
    """`trl.RewardTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(task_type="SEQ_CLS", ...)` or an adapted model. Both
    answers of a pair have the task of their row.
    """


class MoLoraKTOTrainer(RoutingLossMixin, KTOTrainer):
    """`trl.KTOTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model. The answers to other prompts by
    which KTO estimates a divergence are routed with the columns of the row whose prompt they follow, and do not count.
    """
