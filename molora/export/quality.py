"""Try candidates as what they will be, plain LoRAs in stock PEFT on the base model, and measure them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from molora.data import TaskCollator
from molora.evaluation import TaskScore, score_tasks
from molora.export.measure import divergences
from molora.export.options import ExportOptions
from molora.export.report import Quality
from molora.export.source import Source
from molora.plain.lora import PREFIX, PlainLora, write_lora
from molora.plain.moments import Batch


def write_candidate(source: Source, lora: PlainLora, folder: Path) -> None:
    """Write one candidate with everything else the adapter trained."""
    folder.mkdir(parents=True, exist_ok=True)
    others, fields = source.others
    write_lora(
        lora,
        folder,
        base_model=source.base_model,
        modules=[name for name, _ in source.plain.named_modules()],
        task_type=source.config.task_type,
        others=others,
        other_fields=fields,
    )


def compare(
    source: Source, folders: Mapping[str, Path], judged: Sequence[Batch], options: ExportOptions, scored: Sequence[Any]
) -> dict[str, Quality]:
    """Measure the base model, the routed one and each candidate.

    Args:
        source: The adapter.
        folders: The written candidates by name.
        judged: Batches that nothing was fitted to; empty to leave out KL and perplexity.
        options: Whether to score tasks.
        scored: Tasks with rows to score.

    Returns:
        `base`, `routed`, then the candidates in their order.
    """
    longest = source.run.evaluation.eval_max_new_tokens if source.run is not None else 64

    def scores(model: Any) -> list[TaskScore]:
        if not (options.evaluate and scored):
            return []
        return score_tasks(model, source.tokenizer, scored, max_new_tokens=longest, progress=True)

    quality = {"base": Quality(scores=scores(source.plain)), "routed": Quality(scores=scores(source.model))}
    if judged:
        found = divergences(source.model, source.plain, judged)
        quality["base"].kl, quality["base"].perplexity = found.other.kl, found.other.perplexity
        quality["routed"].perplexity = found.routed.perplexity
    for name, folder in folders.items():
        # One at a time: each brings its own copy of whatever was trained whole, and PEFT loads one with biases.
        with _loaded(source.plain, folder) as plain:
            quality[name] = Quality(scores=scores(plain))
            if judged:
                other = divergences(source.model, plain, judged).other
                quality[name].kl, quality[name].perplexity = other.kl, other.perplexity
    return quality


def distilled(
    source: Source, start: Path, lora: PlainLora, rows: Sequence[Mapping[str, Any]], options: ExportOptions
) -> PlainLora:
    """Train a plain LoRA to do what the routed model does.

    Args:
        source: The adapter, whose model is the teacher.
        start: Folder of the plain LoRA to start from.
        lora: The same.
        rows: Encoded rows.
        options: Steps, learning rate and seed.
    """
    from molora.trainers.distillation import DistillationOptions, distil  # costs the import of transformers' trainer

    student = PeftModel.from_pretrained(source.plain, str(start), is_trainable=True)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name)  # what was trained whole is the adapter's, and stays
    try:
        distil(
            student,
            source.model,
            Dataset.from_list([dict(row) for row in rows]),
            TaskCollator(int(source.tokenizer.pad_token_id)),
            steps=options.distill_steps,
            learning_rate=options.distill_learning_rate,
            batch_size=8,
            seed=options.seed,
            disable_tqdm=False,
            distillation=DistillationOptions(hidden_weight=0.1),
        )
        state = {name: p.detach().float().cpu().clone() for name, p in student.named_parameters() if "lora_" in name}
    finally:
        student.unload()

    def trained(name: str, tensor: str) -> torch.Tensor:
        return state[f"{PREFIX}{name}.{tensor}"]

    factors = {
        name: (trained(name, "lora_A.default.weight"), trained(name, "lora_B.default.weight")) for name in lora.factors
    }
    biases = {name: trained(name, "lora_B.default.bias") for name in lora.biases}
    return PlainLora(factors, biases, lora.fan_in_fan_out)


@contextmanager
def _loaded(base: Any, folder: Path) -> Iterator[PeftModel]:
    """The base model with one candidate; without it again afterwards, biases included."""
    biases = {name: p.detach().clone() for name, p in base.named_parameters() if name.endswith("bias")}
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    try:
        yield model
    finally:
        model.unload()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name in biases:
                    parameter.copy_(biases[name])
