"""TRL's supervised fine-tuning trainer with routing losses."""

from trl import SFTTrainer

from molora.trainers.mixin import RoutingLossMixin


class MoLoraSFTTrainer(RoutingLossMixin, SFTTrainer):
    """`trl.SFTTrainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; pass `peft_config=MoLoraConfig(...)` or an adapted model.
    """
