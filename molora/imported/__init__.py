"""Trained adapters that become experts: read from their folders, described in the config, mixed as a preset says."""

from molora.imported.build import LORAS, config_from_adapters
from molora.imported.describe import by_pattern, description_mistakes, expert_at
from molora.imported.folder import ImportedLora, read_lora, read_loras

__all__ = [
    "LORAS",
    "ImportedLora",
    "by_pattern",
    "config_from_adapters",
    "description_mistakes",
    "expert_at",
    "read_lora",
    "read_loras",
]
