"""Make a trained mixture smaller: empty or drop experts, take out ranks, re-rank, merge what does alike.

Pure functions from adapter to adapter (`Adapter` is an adapter folder as data); `slim_adapter` does it from folder to
folder, with a report.
"""

from molora.slim.adapter import Adapter, read_adapter, write_adapter
from molora.slim.changes import ModuleChange, Slimmed
from molora.slim.drop import drop_experts
from molora.slim.job import SlimOptions, SlimResult, slim_adapter
from molora.slim.measure import Quality, output_errors, quality
from molora.slim.merge import merge_experts
from molora.slim.prune import prune_experts, prune_ranks
from molora.slim.report import SLIM_FILE, report_of, slim_table
from molora.slim.rerank import rerank
from molora.slim.statistics import ModuleStatistics, expert_usage

__all__ = [
    "SLIM_FILE",
    "Adapter",
    "ModuleChange",
    "ModuleStatistics",
    "Quality",
    "SlimOptions",
    "SlimResult",
    "Slimmed",
    "drop_experts",
    "expert_usage",
    "merge_experts",
    "output_errors",
    "prune_experts",
    "prune_ranks",
    "quality",
    "read_adapter",
    "report_of",
    "rerank",
    "slim_adapter",
    "slim_table",
    "write_adapter",
]
