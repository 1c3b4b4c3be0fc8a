"""Write each target, with its report and model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from molora.base import gguf_of
from molora.errors import MoloraError
from molora.export.dense import dense_bytes, merge_dense, save_dense
from molora.export.gguf_template import open_template
from molora.export.options import ExportOptions
from molora.export.report import EXPORT_FILE, ExportReport, model_card
from molora.export.source import Source
from molora.gguf_names import architecture_of
from molora.plain.lora import PlainLora, folder_bytes
from molora.writing import new_folder

MOST_RANK = 512
"""Of vLLM."""

_TAGS = {
    "lora": ("lora", "molora"),
    "experts": ("lora", "molora"),
    "tasks": ("lora", "molora"),
    "dense": ("merge", "molora"),
    "gguf-lora": ("gguf", "lora", "molora"),
    "gguf": ("gguf", "molora"),
}
_PARTS = "Each sub-folder is a plain LoRA: `PeftModel.from_pretrained(base, FOLDER/NAME)`. molora is not needed."
_LOADED = {
    "lora": "A plain LoRA: `PeftModel.from_pretrained(base, FOLDER)` with PEFT, `--lora-modules NAME=FOLDER` with "
    "vLLM. molora is not needed.",
    "experts": _PARTS,
    "tasks": _PARTS,
    "dense": "A transformers model: `AutoModelForCausalLM.from_pretrained(FOLDER)`. PEFT and molora are not needed.",
    "gguf-lora": "For llama.cpp: `llama-cli -m BASE.gguf --lora adapter.gguf`.",
    "gguf": "For llama.cpp: `llama-cli -m model.gguf`.",
}


def write_target(
    source: Source, lora: PlainLora, written: Path, out: str | Path, options: ExportOptions, report: ExportReport
) -> None:
    """Write one plain LoRA as what was asked for.

    Args:
        source: The adapter it comes from.
        lora: The LoRA.
        written: A folder that holds it already, as PEFT reads it.
        out: Where to.
        options: Target, dtype and type of numbers.
        report: Goes beside it.
    """
    base = source.plain
    if options.target == "lora":
        with new_folder(out, needs=folder_bytes(lora) + other_bytes(source)) as folder:
            shutil.copytree(written, folder, dirs_exist_ok=True)
            source.tokenizer.save_pretrained(str(folder))
            write_report(folder, report)
    elif options.target == "dense":
        dtype = getattr(torch, options.dtype) if options.dtype else None
        with new_folder(out, needs=dense_bytes(source.model, dtype or base.dtype)) as folder:
            save_dense(merge_dense(source.model, lora, dtype), source.tokenizer, folder)
            write_report(folder, report)
    else:
        _write_gguf(source, lora, out, options, report)


def _write_gguf(
    source: Source, lora: PlainLora, out: str | Path, options: ExportOptions, report: ExportReport
) -> None:
    # Only here: the gguf package is an extra.
    from molora.export.gguf import write_gguf_lora
    from molora.export.gguf_model import write_gguf_model

    config = source.plain.config.get_text_config()
    if options.target == "gguf-lora":
        with new_folder(out, needs=folder_bytes(lora)) as folder:
            write_gguf_lora(
                lora,
                folder / "adapter.gguf",
                base_config=config,
                outtype=options.outtype or "f32",
                base_model=source.base_model,
            )
            write_report(folder, report)
        return
    quantised = getattr(source.plain, "quantization_method", None) is not None
    template = options.gguf_base or gguf_of(source.base_model)
    with new_folder(out, needs=Path(template).stat().st_size if template else 0) as folder:
        write_gguf_model(
            lora,
            folder / "model.gguf",
            template=template,
            base_config=config,
            weights=None if quantised else lambda module: source.plain.get_submodule(module).weight,
            outtype=options.outtype or "f16",
        )
        write_report(folder, report)


def check_target(source: Source, options: ExportOptions) -> None:
    """Refuse what cannot be written, before work is done for it.

    Raises:
        MoloraError: If llama.cpp cannot hold what the adapter trained, or has no GGUF file to start from.
    """
    if options.target not in ("gguf-lora", "gguf"):
        return
    others, _ = source.others
    if others:
        raise MoloraError(
            f"the adapter trained more than experts ({sorted(others)[0]}, ...), which a file for llama.cpp lacks; "
            "use `--as dense`, and llama.cpp's convert_hf_to_gguf.py on the result."
        )
    architecture_of(source.plain.config.get_text_config())
    if options.target == "gguf":
        open_template(options.gguf_base or gguf_of(source.base_model))


def other_bytes(source: Source) -> int:
    """Bytes of what the adapter trained besides experts, which goes into every LoRA."""
    return sum(tensor.numel() * tensor.element_size() for tensor in source.others[0].values())


def what_servers_refuse(source: Source, lora: PlainLora) -> list[str]:
    """Sentences on what vLLM and llama.cpp would stop at."""
    notes = []
    if lora.rank > MOST_RANK:
        notes.append(
            f"vLLM takes ranks up to {MOST_RANK}, and this one is {lora.rank}: add --rank {MOST_RANK}, or less."
        )
    _, fields = source.others
    kept = [name for name, value in fields.items() if value not in (None, "none", [], {})]
    if lora.biases:
        kept.append("lora_bias")
    if kept:
        notes.append(f"The folder has {', '.join(kept)}, which PEFT loads, and vLLM and llama.cpp refuse.")
    return notes


def write_report(folder: Path, report: ExportReport) -> None:
    """Write the report as JSON, and the model card."""
    (folder / EXPORT_FILE).write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    card = model_card(report, _TAGS[report.target], _LOADED[report.target])
    (folder / "README.md").write_text(card, encoding="utf-8")
