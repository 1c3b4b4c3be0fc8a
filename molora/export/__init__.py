"""The way out: plain LoRAs, merged models and files for llama.cpp, exact where that can be, else measured."""

from __future__ import annotations

from molora.export.job import export_adapter
from molora.export.report import ExportReport
from molora.plain.calibrate import Calibration, batches_by_part, calibrate
from molora.plain.fixed import Fixed, fixed_factors
from molora.plain.lora import PlainLora, write_lora

__all__ = [
    "Calibration",
    "ExportReport",
    "Fixed",
    "PlainLora",
    "batches_by_part",
    "calibrate",
    "export_adapter",
    "fixed_factors",
    "write_lora",
]
