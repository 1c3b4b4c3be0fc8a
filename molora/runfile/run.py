"""A loaded run: typed arguments, and where each of them came from."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.config import MoLoraConfig
from molora.errors import ConfigError, MoloraError, Problem
from molora.runfile.arguments import DatasetArguments, EvaluationArguments, LaunchArguments, ModelArguments
from molora.runfile.document import Document, expand

if TYPE_CHECKING:
    from trl import SFTConfig


SINGLE = ("single", "single_gpu")
"""Names of the profile that starts no further process."""

TRAINED_WITH = "5.23"
"""The oldest transformers that runs are trained with."""


def accelerate_profiles() -> dict[str, Path]:
    """The accelerate configurations that have a name, TRL's names for them included."""
    folder = Path(str(importlib.resources.files("molora.configs"))) / "accelerate"
    profiles = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    return {**profiles, "multi_gpu": profiles["ddp"], "single_gpu": profiles["single"]}


@dataclasses.dataclass(frozen=True)
class RunFile:
    """Everything a run file says, checked and typed.

    Attributes:
        path: The file.
        model: Which model, and how to load it.
        adapter: The mixture of experts.
        training: The fields of `SFTConfig` that were given, and only those.
        datasets: The mixture of datasets; local paths are absolute.
        evaluation: How tasks are scored.
        launch: How many processes train, and how.
        overwrite: Whether `output_dir` may already hold files.
        license: Licence of the adapter, for its model card.
        preset: Name of the preset the adapter started from.
    """

    path: Path
    model: ModelArguments
    adapter: MoLoraConfig
    training: dict[str, Any]
    datasets: tuple[DatasetArguments, ...]
    evaluation: EvaluationArguments
    launch: LaunchArguments
    overwrite: bool
    license: str | None
    preset: str | None
    document: Document = dataclasses.field(repr=False, compare=False)

    @property
    def output_dir(self) -> Path:
        """Where the run writes, relative to the current directory."""
        return expand(self.training["output_dir"])

    @property
    def wants_processes(self) -> bool:
        """Whether training is to run in processes that a launcher starts."""
        profile = self.launch.accelerate_config
        return (self.launch.num_processes or 1) > 1 or (profile is not None and profile not in SINGLE)

    def gives(self, field: str) -> bool:
        """Whether the file or the command line sets a top-level key."""
        return bool(self.document.line((field,)))

    def where(self, field: str) -> str:
        """Say where a value came from: `file:line`, `command line`, or the file if it is a default.

        Args:
            field: A key, dotted inside lists and mappings: `target_modules`, `datasets.0.path`.
        """
        parts = field.split(".")
        return self.document.where(tuple(int(part) if part.isdecimal() else part for part in parts))

    def error(self, field: str, message: str) -> ConfigError:
        """Build the error for a mistake that only a later stage can see, pointing at the line of `field`."""
        return ConfigError([Problem(field, message, self.where(field))], f"{self.path} has a mistake")

    def resolved(self) -> dict[str, Any]:
        """Everything the run uses, as data that could itself be written as a run file.

        Training fields that keep the defaults of `SFTConfig` are left out.
        """
        adapter = {entry.name: getattr(self.adapter, entry.name) for entry in MoLoraConfig.user_fields()}
        adapter.pop("task_type")
        return {
            **dataclasses.asdict(self.model),
            "preset": self.preset,
            **{name: sorted(value) if isinstance(value, set) else value for name, value in adapter.items()},
            "datasets": [dataclasses.asdict(dataset) for dataset in self.datasets],
            **self.training,
            **dataclasses.asdict(self.evaluation),
            "overwrite": self.overwrite,
            "license": self.license,
            **dataclasses.asdict(self.launch),
        }

    def sft_config(self, **extra: Any) -> SFTConfig:
        """Build the trainer's config.

        Without an accelerator `use_cpu` is set, as `SFTConfig` demands it there for its default `bf16`.

        Args:
            **extra: Further fields; they win over the file's.

        Raises:
            ConfigError: If `SFTConfig` refuses a combination; it points at the line of the field named.
        """
        import torch
        from trl import SFTConfig

        check_versions()
        fields = {"use_cpu": not torch.accelerator.is_available(), **self.training}
        # SFTConfig warns about the old names even where they are only its own defaults.
        fields.setdefault("activation_checkpointing", fields.pop("gradient_checkpointing", True))
        fields.setdefault("activation_checkpointing_kwargs", fields.pop("gradient_checkpointing_kwargs", None))
        try:
            return SFTConfig(**{**fields, "trust_remote_code": self.model.trust_remote_code, **extra})
        except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
            message = str(error).replace("--", "")
            raise self.error(self._field_named_in(message), message) from error

    def _field_named_in(self, message: str) -> str:
        words = re.findall(r"[a-z][a-z0-9_]+", message)
        return next((word for word in words if word in self.training), "")


def check_versions(installed: str | None = None) -> None:
    """Refuse to train with a transformers that serving can do with, but not this.

    Args:
        installed: Its version; default what is installed.

    Raises:
        MoloraError: If it is too old.
    """
    from importlib.metadata import version

    from packaging.version import Version

    found = installed or version("transformers")
    if Version(found) < Version(TRAINED_WITH):
        raise MoloraError(
            f"runs are trained with transformers {TRAINED_WITH} or newer, and {found} is installed here, as vLLM asks "
            "for; train in an environment without vLLM, and serve the folder from this one."
        )


def check_output_dir(run: RunFile) -> None:
    """Make sure that training overwrites nothing, and that there is something to resume from.

    Raises:
        ConfigError: If `output_dir` holds files and neither `overwrite` nor `resume_from_checkpoint` is set, if it is
            no folder, or if a checkpoint to resume from is missing or not whole.
    """
    folder, resume = run.output_dir, run.training.get("resume_from_checkpoint")
    if folder.exists() and not folder.is_dir():
        raise run.error("output_dir", f"{os.fspath(folder)!r} is a file; name a folder.")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise run.error("output_dir", f"{os.fspath(parent)!r} is a file, so no folder can be made in it.")
    if resume is True and not any(folder.glob("*checkpoint-*")):
        raise run.error("resume_from_checkpoint", f"there is no checkpoint in {os.fspath(folder)!r}.")
    if isinstance(resume, str) and not expand(resume).is_dir():
        raise run.error("resume_from_checkpoint", f"there is no folder {resume!r}.")
    if resume:
        from molora.trainers.checkpoints import checkpoint_to_resume

        try:
            checkpoint_to_resume(resume if resume is True else expand(resume), folder)
        except MoloraError as error:
            raise run.error("resume_from_checkpoint", str(error)) from error
    if folder.is_dir() and any(folder.iterdir()) and not (run.overwrite or resume):
        raise run.error(
            "output_dir",
            f"{os.fspath(folder)!r} already holds files, and nothing is overwritten. Choose another folder, or set "
            "`overwrite: true`, or continue with `resume_from_checkpoint: true`.",
        )
