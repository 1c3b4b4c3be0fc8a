"""lm-evaluation-harness on routed, exported and plain models: its own tasks, and rows of molora's data."""

from molora.harness.evaluate import Evaluation, evaluate
from molora.harness.results import Score

__all__ = ["Evaluation", "Score", "evaluate"]
