"""The groups of a run file that belong to molora itself. Field names are the file's keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt


def _option(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model to adapt and how to load it. The meaning of each field is in its `help` metadata."""

    model_name_or_path: str = field(
        metadata={"help": "Name of a bundled model, id on the hub, or folder (relative to the current directory)."}
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of the model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Precision of the frozen weights; `auto` keeps the one they were saved in."
    )
    attn_implementation: str | None = _option(None, "Attention of the model, as in transformers: `sdpa`, `eager` …")
    trust_remote_code: bool = _option(False, "Run Python code that comes with the model.")
    adapter_name_or_path: str | None = _option(None, "An existing molora adapter to continue training.")
    load_in_8bit: bool = _option(False, "Quantise the model's linears to 8 bits while loading, with bitsandbytes.")
    load_in_4bit: bool = _option(
        False, "Quantise the model's linears to 4 bits while loading, with bitsandbytes; computes in `dtype`."
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _option("nf4", "The kind of 4 bits.")
    use_bnb_nested_quant: bool = _option(False, "Quantise the scales of the 4 bits too.")
    bnb_4bit_quant_storage: Literal["uint8", "int8", "bfloat16", "float16", "float32", "float64"] | None = _option(
        None, "What 4 bits are packed into; `uint8` by default, for FSDP the same as `dtype`."
    )


@dataclass(frozen=True, kw_only=True)
class DatasetArguments:
    """One dataset of the mixture. The meaning of each field is in its `help` metadata."""

    path: str = field(metadata={"help": "File or folder, relative to the run file, or a dataset id on the hub."})
    name: str | None = _option(None, "Configuration of a hub dataset.")
    split: str = _option("train", "Split to train on.")
    task: str | None = _option(None, "Name of the task, for task ids and scores per task.")
    weight: Annotated[float, Gt(0)] = _option(
        1.0, "How often an epoch goes through it: 1 is once, 2 twice, 0.5 a random half."
    )
    max_samples: Annotated[int, Ge(1)] | None = _option(None, "Use at most so many samples.")
    eval_path: str | None = _option(None, "File, folder or hub id to evaluate on; default the same as `path`.")
    eval_split: str | None = _option(None, "Split to evaluate on.")
    eval_max_samples: Annotated[int, Ge(1)] | None = _option(None, "Evaluate on at most so many samples.")


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """How the tasks are scored. The meaning of each field is in its `help` metadata."""

    evaluate_tasks: bool = _option(True, "Score every task before and after training.")
    eval_max_new_tokens: Annotated[int, Ge(1)] = _option(64, "Tokens generated for one answer when scoring.")


@dataclass(frozen=True, kw_only=True)
class RunSwitches:
    """What a run may do beyond training, and what it says. The meaning of each field is in its `help` metadata."""

    overwrite: bool = _option(False, "Allow an `output_dir` that already holds files.")
    license: str | None = _option(
        None, "Licence of the adapter, for its model card, as the hub names it: `apache-2.0`, `mit`, `other` …"
    )


@dataclass(frozen=True, kw_only=True)
class LaunchArguments:
    """How many processes train, and how. The meaning of each field is in its `help` metadata."""

    num_processes: Annotated[int, Ge(1)] | None = _option(
        None, "Processes to train with, one a GPU; `molora train` starts them through accelerate."
    )
    accelerate_config: str | None = _option(
        None,
        "How the processes share the work: `ddp`, `fsdp2`, `zero2`, `zero3` or `single`, or a file that "
        "`accelerate config` wrote. Default `ddp` if there are several.",
    )
