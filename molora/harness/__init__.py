"""lm-evaluation-harness on routed, exported and plain models: its own tasks, and rows of molora's data."""

from molora.harness.evaluate import Evaluation, check_installed, evaluate
from molora.harness.results import Score

__all__ = ["Evaluation", "Score", "check_installed", "evaluate"]
