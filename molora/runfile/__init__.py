"""Run files: a strict YAML loader whose errors name the line, the allowed values and the closest match."""

from molora.runfile.arguments import DatasetArguments, EvaluationArguments, ModelArguments
from molora.runfile.load import load_run_file
from molora.runfile.run import RunFile, check_output_dir, check_versions
from molora.runfile.schema import json_schema

__all__ = [
    "DatasetArguments",
    "EvaluationArguments",
    "ModelArguments",
    "RunFile",
    "check_output_dir",
    "check_versions",
    "json_schema",
    "load_run_file",
]
