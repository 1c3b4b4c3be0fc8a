"""Which checkpoint of a run can be resumed from, and how one makes room for another.

A save can be cut short at any moment. transformers writes `trainer_state.json` last, so whatever was killed before has
none, or half of one, and no run may start from it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from fnmatch import fnmatch
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from molora.errors import MoloraError

logger = logging.getLogger(__name__)

REPLACED = "_replaced-"
"""Stands before the name of a whole checkpoint for as long as another of the same step is written."""

BROKEN = "_broken-"
"""Stands before the name of a broken checkpoint that rotation might keep in place of a whole one."""

OUR_STATE = "WholeCheckpointsMixin"
"""Key of what `WholeCheckpointsMixin` adds to `trainer_state.json`."""

_NAME = re.compile(rf"^({REPLACED})?{PREFIX_CHECKPOINT_DIR}-(\d+)$")
_WEIGHTS = ("*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*")
_OPTIMIZERS = ("*optimizer.pt*", "optimizer*", "global_step*")  # the last is DeepSpeed's folder of everything
_RANDOM = ("rng_state*.pth",)
_SCHEDULERS = ("scheduler.pt", "global_step*")
_ZIPPED = (
    *("*optimizer.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "*model*.bin", "*_states.pt", "answers_*.pth"),
    *_RANDOM,
)


def what_is_missing(folder: str | os.PathLike[str]) -> str | None:
    """Say what keeps a folder from being a checkpoint to resume from; `None` if nothing does.

    Cheap: reads the state and the ends of the other files, which show whether a file was cut off, and not the tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "is no folder"
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        state["global_step"]
    except FileNotFoundError:
        return f"has no {TRAINER_STATE_NAME}, which is written last"
    except (OSError, ValueError, TypeError, KeyError):
        return f"has a damaged {TRAINER_STATE_NAME}"
    paths = sorted(folder.rglob("*"))
    damaged = next((path for path in paths if path.is_file() and _is_cut_off(path)), None)
    if damaged is not None:
        return f"has a damaged {damaged.relative_to(folder)}"
    names = [path.name for path in paths]
    if not _holds(names, _WEIGHTS):
        return "has no weights"
    parts = {"optimizer": _OPTIMIZERS, "scheduler": _SCHEDULERS, "random state": _RANDOM}
    missing = [part for part, patterns in parts.items() if not _holds(names, patterns)]
    # `save_only_model` saves none of them. Ours say whether it was set, another trainer's tell by having some of them.
    only_model = what_we_saved(state).get("save_only_model", len(missing) == len(parts))
    return f"has no {missing[0]}" if missing and not only_model else None


def _holds(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def _is_cut_off(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):  # compares the length that its header promises
                return False
        if _holds([path.name], _ZIPPED):
            with zipfile.ZipFile(path):  # its directory stands at the end
                return False
    except (SafetensorError, zipfile.BadZipFile, OSError):
        return True
    return False


def what_we_saved(state: Any) -> dict[str, Any]:
    """What `WholeCheckpointsMixin` added to a trainer's state."""
    entry = (state.get("stateful_callbacks") or {}).get(OUR_STATE, {})
    return dict(entry.get("attributes", {}))


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether a run can resume from a folder."""
    return what_is_missing(folder) is None


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The whole checkpoint of the highest step, or `None`."""
    return next((os.fspath(folder) for folder in _checkpoints(output_dir) if is_whole(folder)), None)


def _checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints of a run, whole or not, the last first; one being replaced comes after its replacement."""
    found = []
    for folder in Path(output_dir).glob(f"*{PREFIX_CHECKPOINT_DIR}-*"):
        match = _NAME.match(folder.name)
        if match and folder.is_dir():
            found.append((int(match[2]), not match[1], folder))
    return [folder for *_, folder in sorted(found, reverse=True)]


def checkpoint_to_resume(
    given: str | os.PathLike[str] | bool | None, output_dir: str | os.PathLike[str]
) -> str | None:
    """Resolve `resume_from_checkpoint` to a whole checkpoint; `None` if nothing is resumed.

    Args:
        given: `True` for the last whole one, or a folder.
        output_dir: Where the run saves.

    Raises:
        MoloraError: If there is none, or the folder is not a whole one.
    """
    if given is None or given is False:
        return None
    last = last_whole_checkpoint(output_dir)
    if given is not True:
        missing = what_is_missing(given)
        if missing is None:
            return os.fspath(given)
        advice = f"the last whole one is {last!r}." if last else f"there is no whole one in {os.fspath(output_dir)!r}."
        raise MoloraError(f"cannot resume from {os.fspath(given)!r}: it {missing}; {advice}")
    if last is None:
        broken = "; ".join(_skipped(last, output_dir))
        raise MoloraError(
            f"there is no whole checkpoint in {os.fspath(output_dir)!r} to resume from"
            + (f": {broken}. " if broken else ". ")
            + "Train from the start, or give the folder of a checkpoint."
        )
    return last


def warn_of_what_is_not_resumed(found: str, last: bool, output_dir: str | os.PathLike[str]) -> None:
    """Log which later checkpoints are not whole, and if a checkpoint lacks what makes the run the same.

    Args:
        found: The checkpoint that is resumed.
        last: Whether the last one was asked for.
        output_dir: Where the run saves.
    """
    skipped = _skipped(found, output_dir) if last else []
    if skipped:
        logger.warning("resuming from %s, the last whole checkpoint: %s", found, "; ".join(skipped))
    if not _holds(os.listdir(found), _OPTIMIZERS):
        logger.warning(
            "%s holds only the model: the optimizer starts anew, and the run is not the same. save_only_model=False "
            "keeps it",
            found,
        )


def _skipped(last: str | None, output_dir: str | os.PathLike[str]) -> list[str]:
    """What is wrong with the checkpoints after the last whole one."""
    later = takewhile(lambda folder: os.fspath(folder) != last, _checkpoints(output_dir))
    return [f"{folder.name} {what_is_missing(folder)}" for folder in later]


def put_back_replaced(output_dir: str | os.PathLike[str]) -> None:
    """Finish what a kill during a replacement left: of the new checkpoint and the old, keep the one that is whole."""
    for aside in Path(output_dir).glob(f"{REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        folder = aside.with_name(aside.name.removeprefix(REPLACED))
        if is_whole(folder):
            remove(aside)
        elif is_whole(aside):
            remove(folder)
            os.replace(aside, folder)


def make_room(folder: Path) -> None:
    """Clear the place of a checkpoint: a mix of its files and new ones could look whole.

    A whole one moves aside until the new one is whole.
    """
    if is_whole(folder):
        aside = folder.with_name(REPLACED + folder.name)
        remove(aside)
        os.replace(folder, aside)
    else:
        remove(folder)


def keep_out_of_rotation(folder: Path) -> None:
    """Rename broken checkpoints of higher steps: rotation by name would take one for the last, and keep only that."""
    ours = _NAME.match(folder.name)
    for other in folder.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = _NAME.match(other.name)
        if match and ours and int(match[2]) > int(ours[2]) and not is_whole(other):
            aside = other.with_name(BROKEN + other.name)
            remove(aside)
            os.replace(other, aside)
            logger.warning("%s is not whole and is kept as %s; delete it if you need nothing of it", other, aside.name)


def remove(folder: Path) -> None:
    """Delete a checkpoint; what is left when this is interrupted does not look whole."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
