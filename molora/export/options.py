"""What an export may be told, checked all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molora.errors import ConfigError, Problem, one_of
from molora.plain.calibrate import METHODS as FITTED

TARGETS = ("lora", "experts", "tasks", "dense", "gguf-lora", "gguf")
DTYPES = ("float32", "float16", "bfloat16")
OUTTYPES = {"gguf-lora": ("f32", "f16"), "gguf": ("f32", "f16", "bf16", "q8_0", "template")}
METHODS = (*FITTED, "distilled")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How to export an adapter. Field names are those of the command line.

    Attributes:
        target: `lora`, one plain LoRA; `experts` or `tasks`, one for each; `dense`, a merged model; `gguf-lora` or
            `gguf`, a LoRA or a merged model for llama.cpp.
        calibrate: Files of rows to find the nearest plain LoRA with; empty for the data of the adapter's run; `None`
            to allow exact exports only.
        method: How it is found: `uniform`, `usage`, `calibrated` (the default) or `distilled`.
        rank: Rank of the LoRA; default that of the bank.
        bias: Fit a constant for each output too; only PEFT loads it.
        joint: Fit block after block, see `molora.plain.calibrate`.
        rows: At most so many calibration rows.
        task: Id of the task to export for, for routers that read it.
        expert_scores: A number per expert, for routing that reads them.
        prompt: Text after which the export holds, for routers that decide once per prompt.
        group_size: Experts in one LoRA, for `experts`.
        distill_steps: Steps of `distilled`.
        distill_learning_rate: Their learning rate at the start.
        evaluate: Score tasks, if there is data to score on.
        score: Files to score on; empty for the evaluation data of the run.
        base_model: Name or folder of the base model; default the one the adapter names.
        dtype: Of the base model while calibrating; of the result for `dense`. Default the run's, the base model's.
        dequantize: For a quantised base model: undo it, and merge.
        gguf_base: For `gguf`: a GGUF file of the same base model.
        outtype: For `gguf-lora` and `gguf`: type of the written numbers.
        seed: Of every draw.

    Raises:
        ConfigError: Listing all impossible or contradictory values.
    """

    target: str = "lora"
    calibrate: tuple[str, ...] | None = None
    method: str | None = None
    rank: int | None = None
    bias: bool = False
    joint: bool = False
    rows: int = 256
    task: int | None = None
    expert_scores: tuple[float, ...] | None = None
    prompt: str | None = None
    group_size: int | None = None
    distill_steps: int = 60
    distill_learning_rate: float = 2e-4
    evaluate: bool = True
    score: tuple[str, ...] = ()
    base_model: str | None = None
    dtype: str | None = None
    dequantize: bool = False
    gguf_base: str | None = None
    outtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems, "cannot export like this")

    @property
    def chosen_method(self) -> str:
        """How the nearest plain LoRA is found."""
        return self.method or "calibrated"

    def _problems(self) -> Iterator[Problem]:
        if self.target not in TARGETS:
            yield Problem("--as", one_of(self.target, TARGETS))
        if self.method is not None and self.method not in METHODS:
            yield Problem("--method", one_of(self.method, METHODS))
        for name in ("rank", "rows", "group_size", "distill_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Problem(_flag(name), f"got {value}; must be at least 1.")
        if self.calibrate is None:
            for name in ("method", "bias", "joint"):
                if getattr(self, name):
                    yield Problem(_flag(name), "needs data to fit to; add --calibrate.")
        if self.bias and self.target in ("dense", "gguf-lora", "gguf"):
            yield Problem("--bias", f"a fitted constant has no place in {self.target!r}; leave it out.")
        if self.joint and self.chosen_method not in ("calibrated", "distilled"):
            yield Problem("--joint", f"concerns `--method calibrated` only; got {self.method!r}.")
        only = {
            "group_size": ("experts",),
            "gguf_base": ("gguf",),
            "outtype": ("gguf", "gguf-lora"),
            "dequantize": ("dense",),
        }
        for name, targets in only.items():
            if getattr(self, name) and self.target not in targets:
                yield Problem(_flag(name), f"concerns `--as {' or '.join(targets)}` only; got {self.target!r}.")
        if self.target == "experts":
            for name in ("calibrate", "rank", "task", "expert_scores", "prompt"):
                if getattr(self, name) is not None:
                    yield Problem(_flag(name), "experts are exported as they are; leave it out.")
        yield from self._problems_of_values()

    def _problems_of_values(self) -> Iterator[Problem]:
        if self.target == "tasks":
            for name in ("task", "expert_scores", "prompt"):
                if getattr(self, name) is not None:
                    yield Problem(_flag(name), "every task is exported; leave it out, or use `--as lora`.")
            if self.method == "distilled":
                yield Problem("--method", "'distilled' makes one LoRA; use `--as lora`, or another method.")
        if self.dtype is not None and self.dtype not in DTYPES:
            yield Problem("--dtype", one_of(self.dtype, DTYPES))
        if self.outtype is not None and self.target in OUTTYPES and self.outtype not in OUTTYPES[self.target]:
            yield Problem("--outtype", one_of(self.outtype, OUTTYPES[self.target]))
        if self.gguf_base is not None and self.target == "gguf" and not Path(self.gguf_base).expanduser().is_file():
            yield Problem("--gguf-base", f"there is no file {self.gguf_base!r}.")
        for name in ("calibrate", "score"):
            if isinstance(getattr(self, name), str):
                yield Problem(_flag(name), "must be a list of files.")


def _flag(name: str) -> str:
    return {"expert_scores": "--scores"}.get(name, "--" + name.replace("_", "-"))
