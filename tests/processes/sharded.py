"""FSDP2: outputs as of the whole model, training, saving, resuming, and `molora train`."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import methods
import tiny
import torch
import yaml
from common import ROWS, adapted, fsdp2, keep, losses_of, rows, trainer_of, values_of
from torch.distributed.tensor import DTensor

from molora.commands.train import run
from molora.runfile import load_run_file

PRESETS = (
    *("adamole", "smora", "mixlora", "flylora", "hydralora", "mos"),
    *("polytropon-mhr", "x-lora", "glider", "becotta"),
)
LEARNS = {"routing_losses": {"load_balancing": 0.01}, "r": 8, "balance_bias_rate": 0.05}
SAVED = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "learning_rate": 3e-2}


def outputs(folder: Path) -> None:
    """The output of every preset before and after its model is shared out, and its gradient."""
    for preset in PRESETS:
        model = methods.build(preset)
        given = {"input_ids": methods.tokens(rows=2), **methods.inputs_of(model, rows=2)}
        expected = _output_and_gradients(model, given)
        with fsdp2():
            trainer = trainer_of(model, folder / preset)
            trainer.create_optimizer()
            shared, _ = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        held = {isinstance(p, DTensor) for p in shared.parameters()}
        keep(folder, f"output {preset}", expected=expected, got=_output_and_gradients(shared, given), held=held)


def _output_and_gradients(model, given):
    model.train()
    logits = model(**given).logits
    logits.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {name: getattr(g, "full_tensor", lambda g=g: g)().clone() for name, g in grads.items()}


def training(folder: Path) -> None:
    """Train, save, and train the second half again from a checkpoint."""
    where = folder / "sharded"
    given = {"input_ids": methods.tokens(rows=2)}
    with fsdp2():
        straight = trainer_of(adapted("adamole", **LEARNS), where, rows(ROWS), **SAVED)
        straight.train()
        straight.save_model()
        model = straight.model.eval()
        with torch.no_grad():
            logits = model(**given).logits
            answer = model.generate(**given, max_new_tokens=4, do_sample=False)
        results = {"losses": losses_of(straight), "logits": logits, "answer": answer, "given": given}
        keep(folder, "sharded", **results, values=values_of(straight.model))
        resumed = trainer_of(adapted("adamole", **LEARNS), where, rows(ROWS), **SAVED)
        resumed.train(resume_from_checkpoint=str(where / "checkpoint-6"))
        keep(folder, "sharded resumed", values=values_of(resumed.model))


def command(folder: Path) -> None:
    """`molora train` on a model that is shared out: scores before and after, files written once."""
    where = folder / "command"
    if torch.distributed.get_rank() == 0:
        where.mkdir()
        tiny.tiny_llama().save_pretrained(where / "base")
        tiny.tiny_tokenizer().save_pretrained(where / "base")
        texts = [json.dumps({"text": f"the {word} is here"}) + "\n" for word in ("cat", "dog", "fox", "hen")]
        (where / "texts.jsonl").write_text("".join(texts))
        (where / "run.yaml").write_text(yaml.safe_dump(_run_file(where)))
    torch.distributed.barrier()
    printed = io.StringIO()
    with fsdp2(), redirect_stdout(printed):
        run(load_run_file(where / "run.yaml"))
    keep(folder, "command", printed=printed.getvalue())


def _run_file(where: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(where / "base"),
        "preset": "adamole",
        "num_experts": 4,
        "target_modules": "all-linear",
        "datasets": [{"path": "texts.jsonl", "eval_path": "texts.jsonl"}],
        "output_dir": str(where / "out"),
        "num_processes": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "learning_rate": 0.03,
        "bf16": False,
        "disable_tqdm": True,
    }
