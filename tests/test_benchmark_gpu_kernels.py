"""The benchmark of the kernels checks what it times, and its tables, in plain torch on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks import gpu_kernels

ARGUMENTS = [
    *("--device", "cpu", "--width", "16", "--tokens", "1", "5", "--row-tokens", "3", "--rounds", "2"),
    *("--shapes", "4,2,2", "3,2,2,1", "--dtype", "float32"),
]


def _run(monkeypatch, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", *ARGUMENTS, *more])
    return gpu_kernels.main()


def test_every_shape_with_and_without_shared_experts_has_its_tables(monkeypatch, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert _run(monkeypatch, "--json", str(file)) == 0
    titles = [table["title"] for table in json.loads(file.read_text())["tables"]]
    cases = [f"{shape} T{tokens}" for shape in ("E4 r2 k2", "E3+1 r2 k2") for tokens in (1, 5)]
    expected = [f"{case}, {part}" for case in cases for part in ("forward", "forward and backward")]
    assert titles[:8] == expected
    assert [title.partition(" in each")[0] for title in titles[8:]] == ["E4 r2 k2 T3", "E3+1 r2 k2 T3"]
    out = capsys.readouterr().out
    assert out.count("the reference") == len(titles)
    assert out.count(gpu_kernels.WHOLE) == 8


@pytest.mark.parametrize("shared", [0, 1])
def test_what_differs_from_fp64_is_not_timed(shared):
    torch.manual_seed(0)
    layer = gpu_kernels.Layer.random(gpu_kernels.Case(4, 2, 2, 5, shared), 16, torch.float32, "cpu")
    step = layer.mixture("torch")
    assert gpu_kernels.disagreements(layer, step) == []

    def wrong(backward: bool = True) -> list[torch.Tensor]:
        y, *gradients = step(backward)
        return [y, *gradients[:-1], gradients[-1] * torch.nan]

    assert [text.split()[0] for text in gpu_kernels.disagreements(layer, wrong)] == ["dB"]


def test_the_plain_lora_beside_it_has_the_rank_that_a_token_uses():
    case = gpu_kernels.Case(experts=6, rank=8, top_k=2, tokens=1, shared=2)
    assert (case.active_rank, case.total_rank) == (32, 64)


def test_a_case_that_disagrees_ends_the_command_before_a_time(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels, "disagreements", lambda layer, step: ["y is off by 1.00e+00"])
    with pytest.raises(SystemExit, match=r"E4 r2 k2 T1, mixture, torch: y is off by 1.00e\+00. Nothing was timed."):
        _run(monkeypatch)
    assert "median us" not in capsys.readouterr().out
