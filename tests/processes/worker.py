"""Runs every scenario in two processes and alone, in one import of everything. Started by `test_processes.py`.

python worker.py FOLDER
"""

import sys
from pathlib import Path

import ddp
import sharded
import torch
from common import PROCESSES, join

ALONE = PROCESSES
"""The process that is in no group, and sees the rows of both others."""


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if rank != ALONE:
        join(rank, str(folder / "store"))
    ddp.gradients(folder)
    ddp.training(folder)
    if rank != ALONE:
        sharded.outputs(folder)
        sharded.training(folder)
        sharded.command(folder)
        torch.distributed.barrier()  # a process that leaves first takes the other down with it
        torch.distributed.destroy_process_group()


def resume_alone(_: int, folder: Path) -> None:
    torch.set_num_threads(1)
    ddp.resume(folder, folder / f"by {PROCESSES}" / "checkpoint-2", "resumed by one")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for function, count in ((work, PROCESSES + 1), (resume_alone, 1)):
        torch.multiprocessing.start_processes(function, args=(target,), nprocs=count, start_method="fork")
