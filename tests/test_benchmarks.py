"""The benchmark commands, on models of a few hundred weights. No test looks at how long anything took."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks import allocations, checks, command, harness, loops, methods, peers, report
from molora.kernels import dispatch

SIZES = methods.Sizes(hidden=16, intermediate=24, vocab=32, layers=1, heads=2, experts=4, rank=2)
TINY = [
    *("--hidden", "16", "--intermediate", "24", "--vocab", "32", "--layers", "1", "--heads", "2"),
    *("--experts", "4", "--rank", "2", "--length", "6", "--pairs", "2", "--no-peers"),
    *("--only", "molora recommended", "molora top-2", "loop, Mixtral", "base, frozen", "PEFT LoRA r=8"),
]
IDS = torch.arange(1, 9).reshape(1, 8)


@pytest.fixture(autouse=True)
def _same_threads(monkeypatch):
    monkeypatch.setattr(dispatch, "_asked", "auto")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(name: str, tmp_path: Path, *more: str) -> tuple[int, dict]:
    file = tmp_path / "result.json"
    status = importlib.import_module(f"benchmarks.{name}").main([*TINY, "--json", str(file), *more])
    return status, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("training_step", (), ["molora top-2", "loop, Mixtral style", "base, frozen", "x PEFT LoRA r=4"]),
        ("prefill", ("--only", "molora top-2"), ["molora top-2", "x PEFT LoRA r=4"]),
        ("decode", ("--only", "molora top-2", "--new-tokens", "3"), ["molora top-2", "tokens/s"]),
        ("mixed_batch", ("--batch", "3"), ["3 adapters", "one adapter", "prompts of 6", "one token a row"]),
    ],
)
def test_a_timed_command_prints_its_rows_and_writes_them(name, more, words, tmp_path, capsys):
    status, result = _run(name, tmp_path, *more)
    out = capsys.readouterr().out
    assert status == 0
    assert [word for word in words if word not in out] == []
    assert "left out" not in out
    assert out.count("A/A") >= 2
    assert result["command"] == name
    assert {"machine", "versions", "shapes", "time", "clock", "kernels", "checked", "reference"} <= result.keys()
    assert result["machine"].keys() >= {"cpu", "flags", "threads"}
    assert result["shapes"]["dtype"] == "float32"
    for row in result["rows"]:
        assert len(row["ratios"]) == len(row["seconds"]) == 2
        assert len(row["references"]) == 3
        assert row["low"] <= row["median"] <= row["high"]
        assert row["name"] in out


def test_memory_counts_the_same_twice_and_less_for_molora_than_for_a_loop(tmp_path, capsys):
    status, result = _run("memory", tmp_path, "--width", "32", "--tokens", "64")
    out = capsys.readouterr().out
    assert status == 0
    assert "one linear" in out
    assert "whole model" in out
    for part in ("one linear", "whole model"):
        rows = {row["method"]: row for row in result["rows"] if row["part"] == part}
        again = rows["A/A PEFT LoRA r=4"]
        assert (again["peak"], again["saved"]) == (rows["PEFT LoRA r=4"]["peak"], rows["PEFT LoRA r=4"]["saved"])
        assert 0 < rows["molora top-2"]["saved"] < rows["loop, Mixtral style, top-2"]["saved"]
    layer = {row["method"]: row for row in result["rows"] if row["part"] == "one linear"}
    # The output and the gradient of the input, and nothing saved: a frozen linear needs no more.
    assert layer["base, frozen"]["peak"] == 2
    assert layer["base, frozen"]["saved"] == 0


def _broken(how: str) -> methods.Method:
    good = next(method for method in methods.own_methods(SIZES) if method.name == "molora top-2")

    def fast() -> bool:
        return dispatch.backend() != "reference"

    def build(base: nn.Module, sizes: methods.Sizes) -> methods.Built:
        built = good.build(base, sizes)
        layer = next(module for module in built.model.modules() if hasattr(module, "molora_plan"))
        if how == "output":
            layer.register_forward_hook(lambda _m, _i, output: output * 1.05 if fast() else output)
        elif how == "nan":
            layer.register_forward_hook(lambda _m, _i, output: output * torch.nan if fast() else output)
        elif how == "lost gradient":
            built.trained[0].register_hook(lambda gradient: gradient * 0 if fast() else gradient)
        elif how == "gradient":
            built.trained[-1].register_hook(lambda gradient: gradient * 1.05 if fast() else gradient)
        return built

    return replace(good, name=f"broken {how}", build=build)


@pytest.mark.parametrize("how", ["output", "nan", "lost gradient", "gradient"])
def test_a_layer_that_computes_something_else_is_refused_without_a_table(how, monkeypatch, tmp_path, capsys):
    own = [*methods.own_methods(SIZES)[:2], _broken(how)]
    monkeypatch.setattr(command, "own_methods", lambda sizes: own)
    status, result = _run("training_step", tmp_path, "--only", "broken")
    printed = capsys.readouterr()
    assert (status, result, printed.out) == (1, {}, "")
    assert f"'broken {how}' differs from its plain-torch form" in printed.err
    assert "allowed for float32 is 3e-02" in printed.err


def test_a_sound_layer_passes_the_check_that_refuses_broken_ones():
    errors = checks.check_methods([_broken("not")], SIZES, IDS, backward=True, training=True)
    assert errors["broken not"]["error"] <= 1e-5


def test_a_mixed_batch_whose_rows_get_the_wrong_adapter_is_refused(monkeypatch, tmp_path, capsys):
    mixed = importlib.import_module("benchmarks.mixed_batch")
    right = mixed.logits_of
    monkeypatch.setattr(
        mixed, "logits_of", lambda model, ids, names: right(model, ids, None if names is None else names[::-1])
    )
    status, result = _run("mixed_batch", tmp_path, "--batch", "3")
    printed = capsys.readouterr()
    assert (status, result, printed.out) == (1, {}, "")
    assert "row 0 of a mixed batch differs" in printed.err


@pytest.mark.parametrize("name", ["loop, Mixtral style, top-2", "loop, AdaMoLE style"])
def test_a_loop_gives_the_output_and_gradients_of_its_molora_twin(name):
    loop = next(method for method in methods.own_methods(SIZES) if method.name == name)
    with checks.kernels("reference"):
        wanted = checks.outcome(methods.build(loop.twin, SIZES), IDS, backward=True)
    got = checks.outcome(methods.build(loop, SIZES), IDS, backward=True)
    torch.testing.assert_close(got["the logits"], wanted["the logits"])
    compared = 0
    for key, gradient in wanted.items():
        path, _, part = key.removeprefix("the gradient of base_model.model.").partition(".molora_")
        if part:
            names = {"A": "downs", "B": "ups", "router": "router", "threshold": "threshold"}
            mine = names[part.partition(".")[0]] + ("_bias" if part.endswith("bias") else "")
            prefix = f"the gradient of {path}.{mine}"
            pieces = [got[f"{prefix}.{index}"] for index in range(4)] if mine in ("downs", "ups") else [got[prefix]]
            torch.testing.assert_close(torch.cat(pieces, dim=int(mine == "ups")), gradient)
            compared += 1
    assert compared == 7 * (5 if "AdaMoLE" in name else 3)


@pytest.mark.parametrize("kind", [loops.AdamoleLoop, loops.TopKLoop])
def test_a_loop_holds_copies_and_leaves_no_adapter_behind(kind):
    model = get_peft_model(methods.base_model(SIZES), methods.molora_config(SIZES, **methods.ADAPTIVE))
    base = loops.as_loop(model, kind, scale=1.0)
    assert sum(isinstance(module, kind) for module in base.modules()) == 7
    assert not any("molora" in name for name, _ in base.named_parameters())


NOISE = [
    # Quartiles of the A/A rows, then of a row, then what may be said.
    ([(0.98, 1.00, 1.03)], (1.08, 1.10, 1.12), "slower"),
    ([(0.98, 1.00, 1.03)], (0.88, 0.90, 0.92), "faster"),
    ([(0.98, 1.00, 1.03)], (1.01, 1.02, 1.03), harness.INDISTINCT),
    ([(0.98, 1.00, 1.03)], (0.97, 0.98, 0.99), harness.INDISTINCT),
    ([(0.90, 1.00, 1.01)], (1.05, 1.09, 1.20), harness.INDISTINCT),
    # The worse of two A/A rows counts: 0.12 here.
    ([(0.99, 1.00, 1.01), (1.02, 1.10, 1.12)], (1.08, 1.11, 1.30), harness.INDISTINCT),
    # Far off in the median, but a quarter of the runs were on the other side.
    ([(0.98, 1.00, 1.03)], (0.99, 1.20, 1.40), harness.INDISTINCT),
]


@pytest.mark.parametrize(("same", "row", "wanted"), NOISE)
def test_no_difference_is_called_one_below_the_noise_of_equal_things(same, row, wanted):
    def of(low: float, median: float, high: float) -> harness.Spread:
        return harness.Spread(median, low, high)

    assert harness.verdict(of(*row), harness.noise_of(of(*quartiles) for quartiles in same)) == wanted


def test_a_table_without_an_equal_row_has_no_noise_to_judge_by():
    with pytest.raises(ValueError, match="needs an A/A row"):
        harness.noise_of([])


def test_every_run_is_divided_by_the_references_beside_it():
    order: list[str] = []
    seconds = {"candidate": iter([0.0, 3.0, 4.0]), "reference": iter([0.0, 1.0, 2.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    pairs = harness.compare(lambda: run("candidate"), lambda: run("reference"), pairs=2)
    assert order == ["candidate", "reference", "reference", "candidate", "reference", "candidate", "reference"]
    assert pairs.ratios == [3.0 / 1.5, 4.0 / 4.0]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([2.0], (2.0, 2.0, 2.0)), ([1.0, 2.0, 3.0, 4.0, 5.0], (3.0, 2.0, 4.0)), ([4.0, 1.0], (2.5, 1.75, 3.25))],
)
def test_median_and_quartiles(values, wanted):
    found = harness.spread(values)
    assert (found.median, found.low, found.high) == wanted


def test_more_threads_than_one_are_timed_by_the_wall_clock():
    assert [harness.clock_for(threads)[1] for threads in (1, 2)] == ["thread CPU time", "wall clock"]


@pytest.mark.parametrize(
    ("changes", "wanted"), [([], 0), ([4, 4, -4, 2], 8), ([-4, 4], 0), ([4, -4, 4, -4], 4), ([1, 2, 3], 6)]
)
def test_the_peak_is_the_highest_sum_so_far(changes, wanted):
    assert allocations.peak_of(changes) == wanted


def test_the_peak_of_a_run_counts_what_it_holds_at_once():
    size = 1000 * 4

    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(2000)
        del first
        third = torch.empty(500)
        del second, third

    assert allocations.peak_bytes(run) == 3 * size


def test_saved_bytes_are_those_of_storages_that_were_not_there_before():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with allocations.Saved([x, weight]) as saved:
        hidden = nn.functional.linear(x, weight)  # saves x and weight, which are there anyway
        hidden.relu().square().sum()  # both save relu's output, once
    assert saved.bytes == 10 * 6 * 4


def test_a_peer_that_is_not_installed_is_left_out_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found, missing = peers.peer_methods(SIZES)
    assert [method.name for method in found] == ["PEFT Poly", "PEFT X-LoRA"]
    assert set(missing) == {"mixlora top-2", "moe-peft MoLA top-2", "moe-peft LoRAMoE"}
    assert all("pip install --no-deps -r benchmarks/peers.txt" in why for why in missing.values())


def test_peers_that_are_installed_change_the_model_and_train_all_they_have():
    found, _ = peers.peer_methods(SIZES)
    checks.check_methods(found, SIZES, IDS, backward=True, training=True)


def test_a_peer_that_does_nothing_is_refused():
    idle = methods.Method("idle", "peer", lambda base, sizes: methods.Built(base, []))
    with pytest.raises(checks.WrongResultError, match="'idle' does not change the base model's output"):
        checks.check_methods([idle], SIZES, IDS, backward=True, training=True)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], {"molora top-2", "molora top-2, plain torch", "loop"}),
        (["molora top-2"], {"molora top-2"}),
        (["TOP-2"], {"molora top-2", "molora top-2, plain torch"}),
        (["loop", "plain"], {"loop", "molora top-2, plain torch"}),
        (["nothing"], set()),
    ],
)
def test_rows_are_asked_for_by_name_or_by_a_word(words, wanted):
    assert command.asked(["molora top-2", "molora top-2, plain torch", "loop"], words) == wanted


def test_a_table_aligns_words_left_and_numbers_right():
    text = report.table(["method", "x"], [{"method": "a", "x": 1.234}, {"method": "long name", "x": None}])
    assert text.splitlines() == ["method        x", "-" * 15, "a          1.23", "long name     -"]
