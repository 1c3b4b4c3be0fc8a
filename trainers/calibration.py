"""Routers that start from data are calibrated before the first step, with rows of the data they are trained on."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils import broadcast, set_seed
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from molora.calibration import calibrate_routers, needs_calibration
from molora.errors import MoloraError
from molora.routing import Affine
from molora.trainers.callbacks import trained_adapters
from molora.trainers.columns import EXPERT_SCORES, TASK_IDS, take_columns
from molora.trainers.sharding import plain_name, saved_adapters

BY_HAND = "call molora.calibrate_routers(model, batches) yourself before training."

REFERENCE = "ref"
"""Adapter that TRL makes a frozen copy of `default`, where that is trained further: of parameters, not of buffers."""

_CALIBRATED = ("molora_router", "molora_threshold", "molora_bias")


class CalibrationMixin:
    """Calibrates the routers that wait for data, once, before the model is shared out. Part of `RoutingLossMixin`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = getattr(kwargs.get("model", args[0] if args else None), "peft_config", None) or {}
        had_one = REFERENCE in given
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self._has_reference = not had_one and REFERENCE in getattr(trainer.model, "peft_config", {})
        if self._has_reference:
            _complete_reference(trainer.model)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        trainer: Any = self
        if resume_from_checkpoint is None:
            for adapter in trained_adapters(trainer.model):
                if needs_calibration(trainer.model, adapter):
                    self._calibrate(adapter, train_dataloader)
        prepare: Any = super()._prepare_for_training  # type: ignore[misc]  # the trainer this is mixed into
        return prepare(max_steps, train_dataloader, resume_from_checkpoint)

    def _calibrate(self, adapter: str, loader: Any) -> None:
        """Calibrate one adapter: every process by itself, and then all have what the first one found."""
        trainer: Any = self
        model, args = trainer.model, trainer.args
        _refuse_parts(model, adapter)
        rows, seed = (
            model.peft_config[adapter].calibration_rows,
            args.seed if args.data_seed is None else args.data_seed,
        )
        with _random_state_kept():
            set_seed(seed)
            batches = [_for_model(model, batch) for batch in _batches(loader, rows, args.train_batch_size, seed)]
            shown = trainer.is_world_process_zero() and not args.disable_tqdm
            calibrate_routers(model, batches, adapter, seed=seed, progress=shown)
        if trainer.accelerator.num_processes > 1:
            _take_from_the_first(model, adapter, args.device)
        if self._has_reference:
            _complete_reference(model)


def _refuse_parts(model: nn.Module, adapter: str) -> None:
    """Refuse a model that is cut up from the start, as no process could run it by itself."""
    if any(hasattr(parameter, "ds_id") or parameter.is_meta for parameter in model.parameters()):
        raise MoloraError(
            f"adapter {adapter!r} is to be calibrated on a model that is in parts already, as by DeepSpeed's "
            f"zero3_init_flag, or has no weights yet. Load it whole (zero3_init_flag: false), or {BY_HAND}"
        )


def _batches(loader: Any, rows: int, batch_size: int, seed: int) -> Iterator[Any]:
    """Batches of some rows of a training dataloader's data, made as it makes them; the loader itself is left alone.

    Rows are drawn from all of the data, the same in every process, or are the first ones where data streams.

    Args:
        loader: The training dataloader.
        rows: How many rows.
        batch_size: Rows of a batch.
        seed: For the choice.

    Raises:
        MoloraError: If there is no data that could be read twice.
    """
    data, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if data is None or collate is None:
        raise MoloraError(f"the training dataloader has no dataset to take calibration rows from; {BY_HAND}")
    chosen = _first_rows(data, rows) if isinstance(data, IterableDataset) else _drawn_rows(data, rows, seed)
    if not chosen:
        raise MoloraError(f"the training data has no row to calibrate routers with; give some, or {BY_HAND}")
    for start in range(0, len(chosen), batch_size):
        yield collate(chosen[start : start + batch_size])


def _first_rows(data: Any, rows: int) -> list[Any]:
    whole = data.dataset if isinstance(data, IterableDatasetShard) else data
    stream = iter(whole)
    if stream is whole:
        raise MoloraError(f"the training data can be read only once, so no rows are taken from it; {BY_HAND}")
    return list(islice(stream, rows))


def _drawn_rows(data: Any, rows: int, seed: int) -> list[Any]:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return [data[index] for index in order[:rows].tolist()]


def _for_model(model: Any, batch: Any) -> dict[str, Any]:
    """What of a batch the model takes, with the routing columns that say something about whole rows or all tokens.

    Raises:
        MoloraError: If the trainer makes what the model reads only while it trains.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    reads = getattr(base, "main_input_name", "input_ids")
    if not isinstance(batch, Mapping) or reads not in batch:
        rows = batch if isinstance(batch, Sequence) and batch and isinstance(batch[0], Mapping) else [batch]
        holds = ", ".join(map(str, rows[0])) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
        raise MoloraError(
            f"the training data holds {holds}, and no {reads} to calibrate routers with: this trainer makes them "
            f"while it trains. So {BY_HAND}"
        )
    given = dict(batch)
    columns = take_columns(given)
    completion, ids = given.get("completion_mask"), given[reads]
    if "labels" not in given and isinstance(completion, Tensor) and completion.shape == ids.shape:
        given["labels"] = torch.where(completion.bool(), ids, -100)
    known = inspect.signature(base.forward).parameters
    kept = {name: value for name, value in given.items() if name in known}
    per_row = {name: columns[name] for name in (TASK_IDS, EXPERT_SCORES) if name in columns}
    return kept | {name: value for name, value in per_row.items() if len(value) == len(ids)}


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """A block after which everything is drawn as if it had not been."""
    states = random.getstate(), np.random.get_state()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [] if accelerator is None else [torch.accelerator.current_device_index()]
    kind = {} if accelerator is None else {"device_type": accelerator.type}
    with torch.random.fork_rng(devices=devices, **kind):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@torch.no_grad()
def _take_from_the_first(model: nn.Module, adapter: str, device: torch.device) -> None:
    """Give every process what the first one calibrated: they computed the same, but for rounding, which may decide.

    Args:
        model: The model, whole in every process.
        adapter: Name of the adapter.
        device: Where the processes exchange tensors.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    held = [t for name, t in named if any(f".{part}.{adapter}." in name for part in _CALIBRATED)]
    firsts = broadcast(torch.cat([t.detach().reshape(-1).to(device, torch.float32) for t in held]), from_process=0)
    for tensor, first in zip(held, firsts.split([t.numel() for t in held]), strict=True):
        tensor.copy_(first.reshape(tensor.shape))


def _complete_reference(model: nn.Module) -> None:
    """Give TRL's copy of an adapter all that its routers have: with other statistics it would be another model."""
    for layer in model.modules():
        for part in _CALIBRATED:
            held = getattr(layer, part, {})
            if "default" in held and REFERENCE in held:
                held[REFERENCE].load_state_dict(held["default"].state_dict())


def restore_statistics(model: Any, checkpoint: str) -> None:
    """Take up the statistics of router inputs from the adapters in a checkpoint.

    The checkpoints of FSDP and DeepSpeed hold trained parameters only.

    Args:
        model: The adapted model.
        checkpoint: Folder of a checkpoint; adapters other than `default` lie in folders of their names.
    """
    for adapter, saved in saved_adapters(model, checkpoint):
        known = set(saved.keys())
        for name, module in model.named_modules():
            name = plain_name(name)
            key = name.removesuffix(f".{adapter}")
            if isinstance(module, Affine) and key != name and f"{key}.input_mean" in known:
                module.set_statistics(*(saved.get_tensor(f"{key}.{part}") for part in ("input_mean", "input_std")))
