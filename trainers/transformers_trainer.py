"""transformers' trainer with routing losses."""

from molora.trainers.mixin import RoutingLossMixin
from transformers import Trainer


class MoLoraTrainer(RoutingLossMixin, Trainer):
    """`transformers.Trainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; the model is one that `get_peft_model` adapted.
    """
