"""Counts bytes instead of measuring them: what a run allocates, and what autograd keeps for the backward pass."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_of(changes: Iterable[int]) -> int:
    """The highest sum of the changes so far, in bytes; 0 if nothing was ever added to the start."""
    now = peak = 0
    for change in changes:
        now += change
        peak = max(peak, now)
    return peak


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors that a run has at once, over what there was before it.

    The allocator reports every block it gives out or takes back, so temporaries inside an operation count, and the
    number is the same every time.
    """
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only the last of several cycles is kept; there is one
        profiler: Any = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler:
        run()
    results = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return peak_of(event.nbytes() for event in events)


class Saved:
    """Bytes that autograd saves for the backward pass inside `with Saved(...) as saved`, as `saved.bytes`.

    A storage counts once and whole, however many views of it are saved: that is what stays in memory.

    Args:
        free: Tensors that are there anyway, such as parameters and the input, and so cost nothing.
    """

    def __init__(self, free: Iterable[Tensor]) -> None:
        self._free = {tensor.untyped_storage().data_ptr() for tensor in free}
        self._storages: dict[int, int] = {}
        self._kept: list[Tensor] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Sum over the storages."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._free:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor.detach())  # so that no other storage gets its address
        return tensor

    def __enter__(self) -> Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()
