"""Kernels compiled for GPUs that are not here: nothing spills, everything fits, products use the matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.ahead_of_time import of_amdgcn

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
SHARED = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx942": 64 * 1024}
"""Bytes of shared memory that one program may have."""

MATRIX = {"cuda:80": {"mma.sync"}, "cuda:90": {"wgmma.mma_async", "mma.sync"}, "hip:gfx942": {"v_mfma"}}

pytestmark = pytest.mark.slow
"""Minutes for each target."""


@pytest.fixture(scope="module", params=SHARED)
def compiled(request):
    """A target and what the script says about its kernels. Runs by itself: this process has the interpreter's."""
    target = request.param
    command = [sys.executable, SCRIPT, target]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return target, json.loads(done.stdout)


def described(entry: dict) -> str:
    """One line for a message."""
    numbers = ("registers", "spilled", "shared", "num_warps", "num_stages", "matrix", "tile")
    return f"{entry['name']}: " + (entry.get("error") or ", ".join(f"{name} {entry[name]}" for name in numbers))


def complaints(entries: list[dict], wrong) -> str:
    return "\n".join(described(entry) for entry in entries if "error" in entry or wrong(entry))


def test_every_kernel_compiles_and_none_spills(compiled):
    _, entries = compiled
    kernels = {entry["name"].split()[0] for entry in entries}
    assert kernels >= {
        "route_shrink",
        "expand_add",
        "hidden_backward",
        "weight_gradient",
        "rows_route_shrink",
        "rows_expand_add",
        "rows_partial",
        "rows_route_expand",
        "route_ranks",
    }
    wrong = complaints(entries, lambda entry: entry["spilled"])
    assert not wrong, f"registers spill; lower the blocks or raise num_warps in tiles.py:\n{wrong}"


def test_shared_memory_fits(compiled):
    target, entries = compiled
    wrong = complaints(entries, lambda entry: entry["shared"] > SHARED[target])
    assert not wrong, f"more than {SHARED[target]} bytes of shared memory:\n{wrong}"


def test_many_tokens_in_16_bits_use_the_matrix_units_and_wide_loads(compiled):
    target, entries = compiled
    many = [e for e in entries if "bf16" in e["name"] and "few" not in e["name"] and "gate_backward" not in e["name"]]
    assert many
    wrong = complaints(many, lambda entry: not MATRIX[target] & set(entry["matrix"]) or not entry["vector_loads"])
    assert not wrong, f"none of {MATRIX[target]}, or narrow loads:\n{wrong}"


def test_spilled_registers_of_amd_assembly_are_counted():
    text = "  .vgpr_count: 128\n  .vgpr_spill_count: 3\n  .sgpr_spill_count: 2\n"
    assert of_amdgcn(text) == {"registers": 128, "spilled": 5}
    with pytest.raises(RuntimeError, match="vgpr_spill_count"):
        of_amdgcn("  .vgpr_count: 128\n")
