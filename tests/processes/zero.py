"""DeepSpeed ZeRO-2 and ZeRO-3 in two processes on CPUs. Started by `test_processes_deepspeed.py`.

python zero.py FOLDER STAGE
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from common import PROCESSES, ROWS, adapted, join, keep, losses_of, number_of_processes, rows, trainer_of

from molora.runfile.run import accelerate_profiles

SAVED = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3e-2, "use_cpu": False}


def settings_of(profile: str) -> dict[str, str]:
    """The environment that accelerate's launcher makes of one of molora's profiles."""
    given = yaml.safe_load(accelerate_profiles()[profile].read_text())["deepspeed_config"]
    # The model is there before the trainer is, so it is not built in parts.
    given["zero3_init_flag"] = False
    names = {"zero3_init_flag": "ZERO3_INIT"}
    settings = {
        f"ACCELERATE_DEEPSPEED_{names.get(name, name.upper())}": str(value).lower() for name, value in given.items()
    }
    return {**settings, "ACCELERATE_USE_DEEPSPEED": "true"}


def on_cpu() -> None:
    """Let accelerate use DeepSpeed without a GPU, which DeepSpeed can and accelerate does not expect."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for minutes
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def work(rank: int, folder: Path, stage: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(settings_of(f"zero{stage}"), MASTER_ADDR="localhost", MASTER_PORT="29500")
    join(rank, str(folder / f"store{stage}"))
    assert number_of_processes() == PROCESSES
    on_cpu()
    straight = trainer_of(adapted(), folder / "out", rows(ROWS), **SAVED)
    straight.train()
    straight.save_model()
    resumed = trainer_of(adapted(), folder / "resumed", rows(ROWS), **SAVED)
    resumed.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-4"))
    resumed.save_model()
    keep(folder, "zero", losses=losses_of(straight), kind=straight.accelerator.distributed_type.value)
    torch.distributed.barrier()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        work, args=(Path(sys.argv[1]), sys.argv[2]), nprocs=PROCESSES, start_method="fork"
    )
