"""transformers' trainer with routing losses."""

from transformers import Trainer

from molora.trainers.mixin import RoutingLossMixin


class MoLoraTrainer(RoutingLossMixin, Trainer):
    """`transformers.Trainer`, unchanged, plus the routing losses of the adapter's config.

    Takes the same arguments; the model is one that `get_peft_model` adapted.
    """
