"""DeepSpeed ZeRO-2 and ZeRO-3: trains, saves a normal adapter, resumes. Skipped where DeepSpeed is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file

import molora  # noqa: F401  # PEFT learns of the method

pytest.importorskip("deepspeed")
TESTS = Path(__file__).parent


@pytest.mark.parametrize("stage", ["2", "3"])
def test_training_with_deepspeed_leaves_a_normal_adapter_and_resumes(stage, tmp_path):
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, str(TESTS / "processes" / "zero.py"), str(tmp_path), stage],
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = torch.load(tmp_path / "zero-0.pt", weights_only=True)
    assert results["kind"] == "DEEPSPEED"
    assert results["losses"][-1] < results["losses"][0] - 0.1
    adapter, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "resumed"))
    assert adapter.keys() == resumed.keys()
    for name in adapter:
        torch.testing.assert_close(resumed[name], adapter[name], rtol=0, atol=0)
    model = PeftModel.from_pretrained(tiny.tiny_llama(), tmp_path / "out")
    assert {name.replace(".default", "") for name, p in model.named_parameters() if "molora_" in name} == set(adapter)
