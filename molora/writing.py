"""Write new folders and files so that under their final name they are whole or not there.

Everything is written under a hidden name beside the target, on the same disk, and renamed when it is complete. What a
killed process leaves behind keeps the hidden name, and nothing is ever overwritten.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from molora.errors import MoloraError

logger = logging.getLogger(__name__)

SPARE = 16 * 2**20
"""Bytes that must stay free beside what is known to be needed: config, report and model card."""

_PARTIAL = ".partial-"
_ours: set[Path] = set()
"""Hidden names that this process gave; others like them were left behind."""


class WriteError(MoloraError):
    """Something cannot be written where it was asked for; nothing was changed."""


@contextmanager
def new_folder(out: str | Path, needs: int = 0) -> Iterator[Path]:
    """Fill a folder that gets its name when the block ends without an error.

    Args:
        out: Its path; nothing may be there but an empty folder. Parents are made.
        needs: Bytes that will be written, as far as known; checked against the free disk before anything is.

    Yields:
        The folder to write into, under a name of its own for the time being.

    Raises:
        WriteError: If something is in the way, the place cannot be written to, or the disk is or gets full.
    """
    with _named(out, needs) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(out: str | Path, needs: int = 0) -> Iterator[Path]:
    """As `new_folder`, for one file: yields the path to write to."""
    with _named(out, needs) as partial:
        yield partial


@contextmanager
def scratch_folder(out: str | Path) -> Iterator[Path]:
    """A folder for what is on its way to `out`, beside it on the same disk; it is gone when the block ends.

    Raises:
        WriteError: If the place cannot be written to, or the disk gets full.
    """
    target, scratch = _prepare(out, 0)
    try:
        scratch.mkdir()
        yield scratch
    except (OSError, SafetensorError) as error:
        raise _refused(target, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_vacant(out: str | Path) -> None:
    """Refuse a path where something is already.

    Raises:
        WriteError: If it is a file, or a folder that is not empty.
    """
    path = Path(out)
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()):
            raise WriteError(f"{path} exists and is not empty; nothing is overwritten. Give another name.")
    elif path.exists() or path.is_symlink():
        raise WriteError(f"{path} exists; nothing is overwritten. Give another name.")


def check_place(out: str | Path, needs: int = 0) -> None:
    """Refuse a path that could not be written to, before work is done for it.

    Args:
        out: Path of the folder or file to come.
        needs: Bytes that will be written, as far as known.

    Raises:
        WriteError: If something is in the way, the place cannot be written to, or the disk has too little room.
    """
    check_vacant(out)
    parent = Path(out).expanduser().absolute().parent
    existing = next(path for path in (parent, *parent.parents) if path.exists())
    if not existing.is_dir():
        raise WriteError(f"cannot write {out}: {existing} is no folder.")
    if not os.access(existing, os.W_OK | os.X_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise WriteError(f"cannot write {out}: {existing} is read-only. Give a place that can be written to.")
    free = shutil.disk_usage(existing).free
    if free < needs + SPARE * bool(needs):
        raise WriteError(
            f"cannot write {out}: about {size(needs)} are needed and {size(free)} are free there. Make room, or give "
            "a place on another disk."
        )


def size(count: int) -> str:
    """Bytes as people read them."""
    number = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


@contextmanager
def _named(out: str | Path, needs: int) -> Iterator[Path]:
    """A path to make something at, which is renamed when the block ends without an error."""
    target, partial = _prepare(out, needs)
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            _to_disk(path)
        check_vacant(target)
        partial.rename(target)
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise _refused(target, error) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _prepare(out: str | Path, needs: int) -> tuple[Path, Path]:
    target = Path(out).expanduser().absolute()
    check_place(target, needs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(target, error) from error
    for left in set(target.parent.glob(f".{glob.escape(target.name)}{_PARTIAL}*")) - _ours:
        logger.warning("%s was left by a run that was interrupted, or is one that still runs; delete it if not.", left)
    partial = target.parent / f".{target.name}{_PARTIAL}{uuid.uuid4().hex[:8]}"
    _ours.add(partial)
    return target, partial


def _refused(target: Path, error: Exception) -> WriteError:
    code = error.errno if isinstance(error, OSError) else None
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        reason = "the disk is full. Nothing was left behind; make room and run it again."
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        reason = f"{target.parent} cannot be written to."
    else:
        reason = f"{text}."
    return WriteError(f"cannot write {target}: {reason}")


def _to_disk(path: Path) -> None:
    """Have the system write out what it holds, so that a rename never comes before the content."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # some systems open no folders
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(handle)
