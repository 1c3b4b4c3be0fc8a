"""Mixed batches: a different adapter for each row of the input, PEFT's `adapter_names=[...]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from molora.bank import MoLoraLayer
from molora.layer import BASE_ADAPTER


def _pass_names(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: list[str]) -> tuple[Any, Any]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


@contextmanager
def adapters_by_row(tuner: BaseTuner, adapter_names: list[str] | None, num_beams: int | None) -> Iterator[None]:
    """Give every adapted layer the adapter of each row, for the forwards inside the block.

    Args:
        tuner: The tuner around the model.
        adapter_names: One name per row of the batch, `"__base__"` for no adapter; `None` does nothing.
        num_beams: Beams of a beam search, which repeats every row that often, except in an encoder.

    Raises:
        ValueError: In training mode, or if no layer has an adapter of a given name.
    """
    if adapter_names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = {name for layer in tuner.modules() if isinstance(layer, MoLoraLayer) for name in layer.molora_plan}
    missing = set(adapter_names) - known - {BASE_ADAPTER}
    if missing:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(sorted(missing))}; "
            f"this model has {', '.join(sorted(known))}."
        )
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    by_row = [name for name in adapter_names for _ in range(beams)]
    in_encoder = {id(module) for module in _encoder_modules(tuner.model)}
    handles = []
    for module in tuner.modules():
        if isinstance(module, MoLoraLayer | AuxiliaryTrainingWrapper):
            names = list(adapter_names) if id(module) in in_encoder else by_row
            hook = partial(_pass_names, adapter_names=names)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules of an encoder-decoder's encoder, which runs before the rows are repeated for the beams."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        yield from model.get_encoder().modules()
