"""Processes that work off a list of runs. One that fails or dies takes nothing with it but its run."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.quality.data import TaskRows
from benchmarks.quality.jobs import Bench

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Work:
    """What a process needs to begin.

    Attributes:
        bench: What runs have in common.
        rows: The data.
        runs: Folder of results.
        pad: The pad token.
    """

    bench: Bench
    rows: TaskRows
    runs: Path
    pad: int


Target = Callable[[Connection, Any], None]


def work(connection: Connection, given: Work) -> None:
    """A process: load the base once, then do the runs that come until there is none."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    from benchmarks.quality.jobs import write_result
    from benchmarks.quality.training import Place, load_frozen

    place = Place(given.bench.device, given.bench.dtype, given.pad)
    base = load_frozen(given.bench.model, place)
    while (job := connection.recv()) is not None:
        try:
            result = job.run(given.bench, base, given.rows, place)
            write_result(job.file(given.runs, given.bench), result)
            connection.send((result["seconds"], ""))
        except Exception:  # whatever went wrong is told, and the next run is done
            connection.send((0.0, traceback.format_exc()))
        gc.collect()  # trainers hold themselves in circles, and so every model that was trained
        if place.device == "cuda":
            torch.cuda.empty_cache()


class Pool:
    """Worker processes, started when first needed.

    Args:
        given: What each gets.
        size: How many.
        target: What each does.
        start: How they are started. CUDA needs processes that did not use it before; those of `forkserver` share
            what was imported, which takes longer than some runs do.
    """

    def __init__(self, given: Any, size: int, target: Target = work, start: str = "forkserver") -> None:
        self._given, self._size, self._target = given, size, target
        self._workers: list[tuple[Any, Connection]] = []
        self._context: Any = multiprocessing.get_context(start)
        if start == "forkserver":
            self._context.set_forkserver_preload(["benchmarks.quality.jobs", "molora.base"])

    def run(self, jobs: Sequence[Any], done: Callable[[Any, float, str], None]) -> None:
        """Do all jobs, in their order as processes get free.

        Args:
            jobs: What to do.
            done: Told of each that ended: the job, its seconds, and what went wrong.
        """
        waiting = list(jobs)
        running: dict[Any, tuple[Any, Any]] = {}
        while waiting or running:
            while waiting and len(running) < self._size:
                process, connection = self._free(set(running))
                job = waiting.pop(0)
                running[connection] = (job, process)
                with contextlib.suppress(OSError):  # it may have died before it had work, which is found below
                    connection.send(job)
            sentinels = {process.sentinel: connection for connection, (_, process) in running.items()}
            for ready in {sentinels.get(one, one) for one in wait([*running, *sentinels])}:
                job, process = running.pop(ready)
                try:
                    seconds, error = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    self._workers.remove((process, ready))
                    seconds, error = 0.0, _died(process.exitcode)
                done(job, seconds, error)

    def _free(self, busy: set[Connection]) -> tuple[Any, Connection]:
        for process, connection in self._workers:
            if connection not in busy:
                return process, connection
        here, there = self._context.Pipe()
        before = {name: os.environ.get(name) for name in _ONE_THREAD}
        os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # read when the process imports torch
        try:
            process = self._context.Process(target=self._target, args=(there, self._given), daemon=True)
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        there.close()
        self._workers.append((process, here))
        return process, here

    def close(self) -> None:
        """Let the processes end."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, connection in self._workers:
            process.join(timeout=30)
            process.terminate()  # a result that is being written has no name yet, so nothing is half there
            connection.close()
        self._workers.clear()


def _died(code: int | None) -> str:
    if code is not None and code > 0:
        return f"the process ended with exit code {code}; what it printed above says why."
    return f"the process was killed (signal {-(code or 0)}); out of memory? Fewer --workers need less."
