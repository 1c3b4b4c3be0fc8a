"""Try candidates as what they will be, plain LoRAs in stock PEFT on the base model, and measure them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel

from molora.data import TaskCollator
from molora.evaluation import score_tasks
from molora.export.measure import divergences
from molora.export.moments import Batch
from molora.export.options import ExportOptions
from molora.export.plain import PREFIX, PlainLora, write_lora
from molora.export.report import Quality
from molora.export.source import Source

NAME = "{}.lora_{}.{}.weight"


def write_candidate(source: Source, lora: PlainLora, folder: Path) -> None:
    """Write one candidate with everything else the adapter trained."""
    folder.mkdir(parents=True, exist_ok=True)
    others, fields = source.others()
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
    with _loaded(source.plain, folders) as plain:
        blocks: dict[str, Callable[[], AbstractContextManager[Any]]] = {"base": plain.disable_adapter}
        blocks |= {name: partial(_active, plain, name) for name in folders}
        quality = {name: Quality() for name in ("base", "routed", *folders)}
        if judged:
            for name, found in divergences(source.model, blocks, plain, judged, progress=True).items():
                quality[name].kl, quality[name].perplexity = found.kl, found.perplexity
        if options.evaluate and scored:
            longest = source.run.evaluation.eval_max_new_tokens if source.run is not None else 64
            for name in quality:
                model = source.model if name == "routed" else plain
                with blocks.get(name, nullcontext)():
                    quality[name].scores = score_tasks(
                        model, source.tokenizer, scored, max_new_tokens=longest, progress=True
                    )
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
            distillation=DistillationOptions(hidden_weight=0.1),
        )
        state = {name: p.detach().float().cpu().clone() for name, p in student.named_parameters() if "lora_" in name}
    finally:
        student.unload()
    factors = {
        name: tuple(state[PREFIX + NAME.format(name, half, "default")] for half in "AB") for name in lora.factors
    }
    biases = {name: state[f"{PREFIX}{name}.lora_B.default.bias"] for name in lora.biases}
    return PlainLora(factors, biases, lora.fan_in_fan_out)  # type: ignore[arg-type]  # pairs, as there are two halves


@contextmanager
def _loaded(base: Any, folders: Mapping[str, Path]) -> Iterator[PeftModel]:
    """The base model with all candidates as adapters; without any again afterwards."""
    first, *rest = folders
    model = PeftModel.from_pretrained(base, str(folders[first]), adapter_name=first).eval()
    try:
        for name in rest:
            model.load_adapter(str(folders[name]), adapter_name=name)
        yield model
    finally:
        model.unload()


@contextmanager
def _active(model: PeftModel, name: str) -> Iterator[None]:
    model.set_adapter(name)
    yield
