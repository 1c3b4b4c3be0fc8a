"""What the workers share: a group of two processes on CPUs, small data, trainers, and results in files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import tiny
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import get_peft_model
from trl import SFTConfig

from molora import MoLoraConfig
from molora.data.collate import TaskCollator
from molora.runfile.run import accelerate_profiles
from molora.trainers import MoLoraSFTTrainer

PROCESSES = 2
ROWS = 8
"""Rows of one optimizer step, over all processes."""


def join(rank: int, store: str) -> None:
    """Become one of two processes, as a launcher would have started it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)


def number_of_processes() -> int:
    """Those of the group, or one."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rows(count: int = 32) -> Dataset:
    """Rows of unequal length, prompts unsupervised."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        ids = torch.randint(5, 90, ((5, 9, 7, 12, 4)[index % 5],), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "task_ids": index % 2})
    return Dataset.from_list(examples)


def adapted(preset: str = "adamole", **overrides):
    """A tiny Llama with an adapter whose every part is at work."""
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": "all-linear", "init_weights": False, **overrides}
    return get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))


def trainer_of(model, folder: Path, data: Dataset | None = None, **arguments) -> MoLoraSFTTrainer:
    """A trainer whose steps see the same rows however many processes share them."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        "per_device_train_batch_size": ROWS // number_of_processes(),
        "ddp_find_unused_parameters": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        **arguments,
    }
    tokenizer = tiny.tiny_tokenizer()
    return MoLoraSFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=rows() if data is None else data,
        processing_class=tokenizer,
        data_collator=TaskCollator(pad_token_id=tokenizer.pad_token_id),
    )


def losses_of(trainer: MoLoraSFTTrainer) -> list[float]:
    """The logged losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values_of(model) -> dict[str, torch.Tensor]:
    """Trained parameters and balancing biases, whole ones also of a model that is shared out."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad or "molora_bias" in name}
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in found.items()}


def keep(folder: Path, name: str, **results) -> None:
    """Write the results of this process, for the tests to read."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else "alone"
    torch.save(results, folder / f"{name}-{rank}.pt")


@contextmanager
def fsdp2() -> Iterator[None]:
    """Let accelerate share models out as molora's own profile says.

    accelerate does so on GPUs only, although torch can on CPUs, so it is made to believe that the processes have them.
    """
    profile = yaml.safe_load(accelerate_profiles()["fsdp2"].read_text())
    settings = {name.upper(): str(value).lower() for name, value in profile["fsdp_config"].items()}
    # As accelerate's launcher spells them.
    for name in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE"):
        settings[name] = settings[name].upper()
    start = PartialState.__init__

    def started(self: PartialState, *args, **kwargs) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    with (
        patch.dict(os.environ, ACCELERATE_USE_FSDP="true", **settings),
        patch.object(PartialState, "__init__", started),
    ):
        yield
