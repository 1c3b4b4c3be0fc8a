"""TRL's supervised fine-tuning trainer with routing losses."""

from molora.trainers.mixin import RoutingLossMixin
from trl import SFTTrainer


class MoLoraSFTTrainer(RoutingLossMixin, SFTTrainer):
    """`trl.SFTTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model.
    """
