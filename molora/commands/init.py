"""`molora init`: a run file to start from, with comments."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from molora.base import PACKAGED
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem, did_you_mean
from molora.presets import available_presets
from molora.writing import new_file

_EXAMPLE = "data/train.jsonl"

_FILE = """\
# A run of molora. Paths are relative to this file.
#
#   molora plan {name}                          # a dry run: what would be trained, on what, with how much memory
#   molora train {name}                         # train; any key can be overridden: --learning_rate 5e-4
#   molora generate {output} --prompt "…"       # ask it

### model
model_name_or_path: {model}   # hub id, local folder, or the packaged {packaged}
# dtype: float32                            # for CPUs; default as the checkpoint has it, mostly bfloat16
# load_in_4bit: true                        # a quantised base: docs/quantization.md

### adapter: any field of MoLoraConfig; `molora presets` lists methods, `molora schema` explains every field
preset: {preset}
# {num_experts:<41} # fields on top of the preset, with its own values
# {r:<41} # rank of one expert
target_modules: all-linear                  # or a list of name endings: [q_proj, v_proj]

### data: JSON Lines with `messages`, with `prompt` and `completion`, or with `text`
datasets:
{datasets}

### training: any field of TRL's SFTConfig
# license: apache-2.0                       # of the adapter, for its model card; none is named without
output_dir: {output}                 # must not exist, or be empty: nothing is overwritten
num_train_epochs: 1
per_device_train_batch_size: 8
learning_rate: 1.0e-3
lr_scheduler_type: cosine
warmup_steps: 0.06                          # below 1: a share of all steps
max_length: 1024                            # tokens; longer rows are cut
logging_steps: 10
# bf16: false                               # on CPUs, most of which compute bf16 slowly
# resume_from_checkpoint: true              # go on from the last whole checkpoint
"""

_DATASET = """\
  - path: {path}
    task: {task}
    # eval_path: …                          # rows that are held out: scored before and after
    # weight: 2.0                           # twice in each epoch"""


def run(path: str, *, preset: str, model: str, data: Sequence[str]) -> int:
    """Write the file.

    Args:
        path: Where.
        preset: Method to start from.
        model: The base model.
        data: Files of rows; an example without.

    Raises:
        ConfigError: If there is no such preset.
        WriteError: If something is there already, or the place cannot be written to.
    """
    if preset not in available_presets():
        hint = did_you_mean(preset, available_presets())
        message = f"there is no preset {preset!r}; `molora presets` lists them.{hint}"
        raise ConfigError([Problem("--preset", message)], "no such method")
    with new_file(path) as partial:
        partial.write_text(content(Path(path).name, preset, model, data or [_EXAMPLE]), encoding="utf-8")
    sys.stdout.write(f"wrote {path}; next: molora plan {path}\n")
    return 0


def content(name: str, preset: str, model: str, data: Sequence[str]) -> str:
    """The text of a run file.

    Args:
        name: Of the file.
        preset: Method to start from.
        model: The base model.
        data: Files of rows, each a task named as its file.
    """
    entries = [_DATASET.format(path=_scalar(one), task=_scalar(Path(one).name.partition(".")[0])) for one in data]
    config = MoLoraConfig.from_preset(preset)
    return _FILE.format(
        name=name,
        output=f"runs/{Path(name).stem}",
        model=_scalar(model),
        packaged=PACKAGED,
        preset=preset,
        num_experts=f"num_experts: {config.num_experts}",
        r=f"r: {config.r}",
        datasets="\n".join(entries),
    )


def _scalar(text: str) -> str:
    """A text in YAML: as it is where nothing in it means something else, or in quotes, as in JSON."""
    plain = re.fullmatch(r"[A-Za-z./~][\w./~-]*", text) and text.lower() not in (
        "yes",
        "no",
        "on",
        "off",
        "true",
        "null",
    )
    return text if plain else json.dumps(text, ensure_ascii=False)
