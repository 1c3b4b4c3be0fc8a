"""DDP: gradients, balancing biases, schedules and checkpoints, in two processes and alone."""

from __future__ import annotations

from pathlib import Path

import torch
from common import ROWS, adapted, keep, number_of_processes, rows, trainer_of, values_of

from molora import record_routing

BALANCED = {"load_balancing": 0.5}
GLOBAL = {"load_balancing": {"coefficient": 0.5, "scope": "global"}}
RECOMPUTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
SPARSE = {"routing_losses": BALANCED, "num_experts": 32, "top_k": 1, "renormalize": False, "r": 2}
POOLED = {"num_experts": 1, "r": 4, "pool_rank": 3, "private_rank": 1, "num_shards": 2}
GRADIENTS = {
    "task loss": ("adamole", {"routing_losses": {}}, {}),
    "load balancing": ("adamole", {"routing_losses": BALANCED}, {}),
    "balancing over all processes": ("adamole", {"routing_losses": GLOBAL}, {}),
    "balancing over all processes, accumulation": (
        "adamole",
        {"routing_losses": GLOBAL},
        {"gradient_accumulation_steps": 2},
    ),
    "checkpointing": ("adamole", {"routing_losses": BALANCED}, RECOMPUTED),
    "idle experts": ("mole", SPARSE, {}),
    "idle experts, checkpointing": ("mole", SPARSE, RECOMPUTED),
    "accumulation": ("adamole", {"routing_losses": BALANCED}, {"gradient_accumulation_steps": 2}),
    "router learns by its loss alone": ("mole", {"routing_losses": BALANCED, "weights": "one"}, {}),
    "experts of a block": ("mixlora", {"routing_losses": BALANCED, "r": 3}, {}),
    "one router": ("adamole", {"routing_losses": BALANCED, "router_sharing": "model"}, {}),
    "shared pools": ("mos", POOLED, {}),
}
"""Preset, fields of the adapter, arguments of the trainer."""

MOVED = {
    "balance_bias_rate": 0.05,
    "routing_losses": BALANCED,
    "routing_schedules": {"temperature": {"start": 2.0, "end": 1.0}},
}
SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def gradients(folder: Path) -> None:
    """Gradients at the first optimizer step, before clipping, and whether an expert got no token here."""
    for name, (preset, fields, arguments) in GRADIENTS.items():
        batch = ROWS // number_of_processes() // arguments.get("gradient_accumulation_steps", 1)
        arguments = {**arguments, "per_device_train_batch_size": batch, "max_steps": 1, "max_grad_norm": 0.0}
        trainer = trainer_of(adapted(preset, **fields), folder / "out", rows(ROWS), **arguments)
        caught: dict[str, torch.Tensor] = {}

        def catch(*args, trainer=trainer, caught=caught, **kwargs) -> None:
            named = trainer.model.named_parameters()
            caught.update({name: p.grad.clone() for name, p in named if p.grad is not None})

        trainer.create_optimizer_and_scheduler(1)
        trainer.optimizer.register_step_pre_hook(catch)
        with record_routing(trainer.model) as records:
            trainer.train()
        used = [record.routing.selected.flatten(0, -2).any(dim=0) for record in records]
        keep(folder, f"gradients {name}", gradients=caught, idle=any(not experts.all() for experts in used))


def training(folder: Path) -> None:
    """Four steps with biases and schedules, the second half also from a checkpoint."""
    where = folder / f"by {number_of_processes()}"
    straight = trainer_of(adapted("mole", **MOVED), where, **SAVED)
    straight.train()
    spec = next(module.molora_spec["default"] for module in straight.model.modules() if hasattr(module, "molora_spec"))
    keep(folder, "straight", values=values_of(straight.model), temperature=spec.temperature)
    resume(folder, where / "checkpoint-2", "resumed")


def resume(folder: Path, checkpoint: Path, name: str) -> None:
    """The last two of four steps."""
    trainer = trainer_of(adapted("mole", **MOVED), folder / name, **SAVED)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == SAVED["max_steps"]
    keep(folder, name, values=values_of(trainer.model))
