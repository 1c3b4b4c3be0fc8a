"""The table of every key a run file may have: its group, type, default and help."""

from __future__ import annotations

import dataclasses
import enum
import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Lt

from molora.runfile.arguments import (
    DatasetArguments,
    EvaluationArguments,
    LaunchArguments,
    ModelArguments,
    RunSwitches,
)
from molora.runfile.renamed import REFUSED

MODEL, ADAPTER, TRAINING, DATA, EVALUATION, RUN = "model", "adapter", "training", "datasets", "evaluation", "run"
LAUNCH = "launch"

_Count = Annotated[int, Ge(1)]
_Positive = Annotated[float, Gt(0)]
_NotNegative = Annotated[float, Ge(0)]
_Share = Annotated[float, Ge(0), Lt(1)]

_TRAINING_HINTS: dict[str, Any] = {
    # Bounds: TrainingArguments checks few of these, and fails late or not at all on the others.
    "per_device_train_batch_size": _Count,
    "per_device_eval_batch_size": _Count,
    "gradient_accumulation_steps": _Count,
    "eval_accumulation_steps": _Count | None,
    "torch_empty_cache_steps": _Count | None,
    "save_total_limit": _Count | None,
    "max_length": _Count | None,
    "dataloader_num_workers": Annotated[int, Ge(0)],
    "dataloader_prefetch_factor": _Count | None,
    "seed": Annotated[int, Ge(0)],
    "data_seed": Annotated[int, Ge(0)] | None,
    # 0 would silently mean "count epochs", as -1 does.
    "max_steps": Literal[-1] | _Count,
    "num_train_epochs": _Positive,
    "learning_rate": _NotNegative,
    "weight_decay": _NotNegative,
    "warmup_steps": _NotNegative,
    "max_grad_norm": _NotNegative,
    "adam_beta1": _Share,
    "adam_beta2": _Share,
    "adam_epsilon": _Positive,
    "label_smoothing_factor": _Share,
    "logging_steps": _Positive,
    "save_steps": _Positive,
    "eval_steps": _Positive | None,
    "eval_delay": _NotNegative,
    # Types: narrower than SFTConfig's where its extra form is only for its own command line.
    "output_dir": str,
    "lr_scheduler_kwargs": dict[str, Any] | None,
    "activation_checkpointing_kwargs": dict[str, Any] | None,
    "gradient_checkpointing_kwargs": dict[str, Any] | None,
    "include_num_input_tokens_seen": Literal["all", "non_padding", "no"] | bool,
    # Wider: `Trainer.train` takes true for the last checkpoint of `output_dir`.
    "resume_from_checkpoint": bool | str | None,
}


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the file, or of an entry of its `datasets`.

    Attributes:
        name: As written in the file.
        group: Which group of arguments it belongs to.
        hint: Type of its value, with choices as `Literal` and bounds as `Annotated`.
        help: What it means.
        default: Its default; `dataclasses.MISSING` if there is none, or only the run knows it.
    """

    name: str
    group: str
    hint: Any
    help: str
    default: Any


def _keys_of(group: str, cls: Any, fields: tuple[dataclasses.Field[Any], ...]) -> list[Key]:
    hints = get_type_hints(cls, include_extras=True)
    return [
        Key(entry.name, group, hints[entry.name], entry.metadata.get("help", "").replace("%%", "%"), _default(entry))
        for entry in fields
    ]


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def _adapter_keys() -> list[Key]:
    from molora.config import MoLoraConfig
    from molora.config_checks import NAMES
    from molora.presets import available_presets

    preset = Key(
        "preset",
        ADAPTER,
        Literal[tuple(available_presets())] | None,
        "A published method; any field given besides it wins over it.",
        None,
    )
    keys = [preset]
    for key in _keys_of(ADAPTER, MoLoraConfig, MoLoraConfig.user_fields()):
        if key.name in NAMES:
            allowed: Any = Literal[tuple(NAMES[key.name])]
            key = dataclasses.replace(key, hint=allowed | None if key.default is None else allowed)
        keys.append(key)
    return keys


def _training_keys() -> list[Key]:
    from transformers.debug_utils import DebugOption
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl import SFTConfig

    reporters: Any = Literal["none", "all", *INTEGRATION_TO_CALLBACK]
    special = _TRAINING_HINTS | {
        "report_to": reporters | list[reporters] | None,
        "debug": Literal["", *(option.value for option in DebugOption)],
    }
    keys = []
    for entry in dataclasses.fields(SFTConfig):
        if not entry.init:
            continue
        (key,) = _keys_of(TRAINING, SFTConfig, (entry,))
        hint = special.get(key.name) or _closed(key.hint, entry.metadata.get("choices"))
        default = dataclasses.MISSING if key.name == "output_dir" else key.default
        keys.append(dataclasses.replace(key, hint=hint, default=default))
    return keys


def _closed(hint: Any, choices: Any) -> Any:
    """Turn `SomeEnum | str`, and text with a list of choices beside it, into a `Literal`."""
    variants = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for variant in variants:
        if isinstance(variant, type) and issubclass(variant, enum.Enum):
            choices = [member.value for member in variant]
    if not choices:
        return hint
    allowed: Any = Literal[tuple(choices)]
    return allowed | None if type(None) in variants else allowed


@cache
def top_level_keys() -> dict[str, Key]:
    """Every key of the file's top level by name.

    Raises:
        RuntimeError: If two groups claim one name, so that a new version of trl or peft cannot shadow a key silently.
    """
    datasets = Key(DATA, DATA, list[dict[str, Any]], "The datasets to train on, at least one.", dataclasses.MISSING)
    own = [
        *_keys_of(MODEL, ModelArguments, dataclasses.fields(ModelArguments)),
        *_keys_of(EVALUATION, EvaluationArguments, dataclasses.fields(EvaluationArguments)),
        *_keys_of(RUN, RunSwitches, dataclasses.fields(RunSwitches)),
        *_keys_of(LAUNCH, LaunchArguments, dataclasses.fields(LaunchArguments)),
        datasets,
    ]
    # molora loads the model, so loading it is a matter of the model's group.
    training = [key for key in _training_keys() if key.name != "trust_remote_code"]
    table: dict[str, Key] = {}
    for key in [*own, *_adapter_keys(), *training]:
        if key.name in REFUSED:
            continue
        if key.name in table:
            raise RuntimeError(f"{key.name!r} belongs to both {table[key.name].group} and {key.group}")
        table[key.name] = key
    return table


@cache
def dataset_keys() -> dict[str, Key]:
    """Every key of an entry of `datasets` by name."""
    return {key.name: key for key in _keys_of(DATA, DatasetArguments, dataclasses.fields(DatasetArguments))}
