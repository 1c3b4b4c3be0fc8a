"""The command `molora`: arguments, exit codes, and nothing heavy until a command runs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Sequence

from molora_cli.arguments import parse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `molora`; default those of the process. `--debug` may stand anywhere.

    Returns:
        0 for success, 2 for a mistake in the command line, the run file or the data, 130 after Ctrl-C, and 1 for
        anything else that went wrong.
    """
    # tqdm reads this when it is imported: bars of what takes less, such as transformers' for weights, do not flash by.
    os.environ.setdefault("TQDM_DELAY", "2")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parse([word for word in words if word != "--debug"])
        arguments.words = words
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except SystemExit as stop:
        # argparse has printed its message, or the help that was asked for.
        return _flushed(stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt:
        print("molora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:
        return _explained(error, debug)


_SECONDS_OF_SILENCE = 10


def _explained(error: Exception, debug: bool) -> int:
    """Print what went wrong and return the exit code."""
    process = int(os.environ.get("RANK", 0))
    if process:
        # What is wrong for one process is wrong for all: then the launcher ends this one before it says so again.
        time.sleep(_SECONDS_OF_SILENCE)
        print(f"process {process}:", file=sys.stderr)
    if debug:
        sys.excepthook(type(error), error, error.__traceback__)
    # A command that got as far as raising one of these has imported the module.
    errors = sys.modules.get("molora.errors")
    if errors and isinstance(error, errors.MoloraError):
        print(error, file=sys.stderr)
        return 2
    if isinstance(error, ImportError | RuntimeError) and (broken := broken_extras()):
        print(
            f"molora: {', '.join(broken)} cannot be imported beside this torch, and transformers imports whatever of "
            f"them is installed. Language models need none of it: pip uninstall -y {' '.join(broken)}",
            file=sys.stderr,
        )
        return 2
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    print(f"molora: error: {reason}{'' if debug else ' (--debug shows where)'}", file=sys.stderr)
    return 1


def broken_extras() -> list[str]:
    """Packages for images and sound that are installed and cannot be imported, as a server's CPU build brings them."""
    found = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)
        except Exception:  # an operator that torch lacks, a library that is missing, ...
            found.append(name)
    return found


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    return code


def _closed_pipe() -> int:
    """The reader, such as `head`, is gone; keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
