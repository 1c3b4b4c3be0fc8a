"""The way out: plain LoRAs, merged models and files for llama.cpp, exact where that can be, else measured."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molora.export.calibrate import Calibration, batches_by_part, calibrate
    from molora.export.experts import expert_loras, task_loras
    from molora.export.fixed import Fixed, fixed_factors
    from molora.export.job import ExportReport, export_adapter
    from molora.export.plain import PlainLora, write_lora

_HOMES = {
    "Calibration": "calibrate",
    "ExportReport": "job",
    "Fixed": "fixed",
    "PlainLora": "plain",
    "batches_by_part": "calibrate",
    "calibrate": "calibrate",
    "expert_loras": "experts",
    "export_adapter": "job",
    "fixed_factors": "fixed",
    "task_loras": "experts",
    "write_lora": "plain",
}
"""Names by the module they are imported from when first asked for: models need a part of it only, and `job` needs
models."""

__all__ = [
    "Calibration",
    "ExportReport",
    "Fixed",
    "PlainLora",
    "batches_by_part",
    "calibrate",
    "expert_loras",
    "export_adapter",
    "fixed_factors",
    "task_loras",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
