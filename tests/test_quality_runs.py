"""The quality bench: its arms, its runs and their processes, and a whole bench on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import quality
from quality import MIXTURE, PLACE, rows_of
from tiny import tiny_llama, tiny_tokenizer

from benchmarks.quality import arms, jobs, plot, pool, statistics
from benchmarks.quality.__main__ import main
from molora.errors import ConfigError

task_folder = quality.task_folder

# Arms


def test_equal_budgets_are_computed_from_the_mixture():
    known = arms.read_arms(None)
    base = tiny_llama(num_hidden_layers=1)
    mixture = arms.parameters(base, arms.resolved(known, "top2", base, 3).fields)
    whole, active, oracle = (arms.resolved(known, name, base, 3) for name in ("lora", "lora-active", "oracle"))
    per_rank = arms.parameters(base, {**whole.fields, "r": 1})["all"]
    assert abs(arms.parameters(base, whole.fields)["all"] - mixture["all"]) <= per_rank / 2
    assert active.fields["r"] == 16
    assert oracle.fields["num_experts"] == 3
    assert oracle.fields["r"] == whole.fields["r"] // 3
    assert (whole.fields["lora_alpha"], active.fields["lora_alpha"]) == (2 * whole.fields["r"], 32)
    assert mixture["router"] == 8 * (6 * 32 + 64)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("mine: {top_kk: 2}", ["mine.top_kk", "Did you mean 'top_k'"]),
        ("mine: {learning_rates: [1e-3]}", ["mine.learning_rates", "numbers above 0"]),
        ("mine: {learning_rates: 0.1}", ["mine.learning_rates"]),
        ("[1, 2]", ["mapping from names of arms"]),
        ("my/arm: {r: 2}", ["my/arm", "letters, digits"]),
        ("{", ["cannot be read"]),
    ],
)
def test_a_wrong_file_of_arms_is_refused_with_what_is_wrong(tmp_path, content, words):
    file = tmp_path / "arms.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        arms.read_arms(file)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"equal_parameters_to": "topp2"}, ["'topp2'", "top2"]),
        ({"selection": "top_k", "top_k": 0}, ["mine: top_k"]),
    ],
)
def test_an_arm_that_cannot_be_is_refused_before_any_run(tmp_path, fields, words):
    file = tmp_path / "arms.json"
    file.write_text(json.dumps({"mine": fields}))
    with pytest.raises(ConfigError) as caught:
        arms.resolved(arms.read_arms(file), "mine", tiny_llama(num_hidden_layers=1), 2)
    assert [word for word in words if word not in str(caught.value)] == []


def test_all_built_in_arms_can_be_built_and_run_with_their_fields(task_folder):
    base, known, rows = tiny_llama(num_hidden_layers=1), arms.read_arms(None), rows_of(task_folder)
    bench = jobs.Bench("tiny", "float32", "cpu", rows.names, rows.digest, 4, 8, 128, 5, 6)
    for name in known:
        arm = arms.resolved(known, name, base, 2)
        job = jobs.Job(arm, 0, 1e-3, "initial", 0 if arm.one_task else None)
        found = jobs.run_job(job, bench, base, rows, PLACE)
        assert found["parameters"]["all"] > 0
        assert bool(found.get("routing_initial")) == (arm.fields.get("preset") != "lora"), name


# Runs


def _die(connection, given):
    """A worker that ends at the job `die`, is killed at `kill`, and fails at `fail`."""
    while (job := connection.recv()) is not None:
        if job == "die":
            os._exit(7)
        if job == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send((1.0, "it failed" if job == "fail" else ""))


def test_a_run_that_fails_or_kills_its_process_leaves_the_others():
    found = {}
    workers = pool.Pool(None, 1, _die, start="fork")  # which imports nothing anew
    workers.run(["die", "fine", "kill", "fail", "also fine"], lambda job, seconds, error: found.update({job: error}))
    workers.run(["later"], lambda job, seconds, error: found.update({job: error}))
    workers.close()
    assert found.keys() == {"die", "fine", "kill", "fail", "also fine", "later"}
    assert "exit code 7" in found["die"]
    assert "out of memory" in found["kill"]
    assert found["fail"] == "it failed"
    assert {found[job] for job in ("fine", "also fine", "later")} == {""}


def test_one_changed_setting_is_another_run(tmp_path):
    bench = jobs.Bench("tiny", "float32", "cpu", ("a", "b"), "0", 4, 8, 128, 5, 6)
    arm = arms.Arm("mine", {"r": 2})
    job = jobs.Job(arm, 0, 1e-3, "final")
    others = [
        jobs.Job(arm, 1, 1e-3, "final").file(tmp_path, bench),
        jobs.Job(arm, 0, 2e-3, "final").file(tmp_path, bench),
        jobs.Job(arm, 0, 1e-3, "tuning").file(tmp_path, bench),
        jobs.Job(arm, 0, 1e-3, "final", 1).file(tmp_path, bench),
        jobs.Job(arms.Arm("mine", {"r": 4}), 0, 1e-3, "final").file(tmp_path, bench),
        job.file(tmp_path, jobs.Bench("tiny", "float32", "cpu", ("a", "b"), "0", 5, 8, 128, 5, 6)),
    ]
    assert len({job.file(tmp_path, bench), *others}) == 7
    assert jobs.Job(arms.Arm("mine", {"r": 2}, (1.0,)), 0, 1e-3, "final").file(tmp_path, bench) == job.file(
        tmp_path, bench
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--seeds", "0,100"], ["--tuning_seeds", "[100]"]),
        (["--learning_rates", "lorra=1"], ["'lorra'", "Did you mean 'lora'"]),
        (["--arms", "top3"], ["'top3'", "Did you mean 'top2'"]),
        (["--reference", "loraa"], ["--reference", "Did you mean 'lora'"]),
        (["--steps", "1", "--batch_size", "1"], ["too few for 2 tasks"]),
    ],
)
def test_a_mistake_in_the_command_ends_it_with_a_sentence(task_folder, model_folder, tmp_path, capsys, more, words):
    given = ["--tasks", str(task_folder), "--out", str(tmp_path / "out"), "--model", str(model_folder)]
    assert main([*given, *more]) == 1
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []
    assert not (tmp_path / "out").exists()


ARMS = {
    "mine": {
        **{name: MIXTURE[name] for name in ("r", "num_experts", "selection", "top_k")},
        "learning_rates": [0.001, 0.01],
    },
    "plain": {"preset": "lora", "equal_parameters_to": "mine", "learning_rates": [0.01]},
    "apart": {"preset": "lora", "equal_parameters_to": "mine", "learning_rates": [0.01], "one_task": True},
    # Fails when the second task comes.
    "broken": {"router": "task", "num_tasks": 1, "selection": "top_k", "learning_rates": [0.01]},
}


@pytest.fixture(scope="module")
def command(task_folder, model_folder, tmp_path_factory):
    """The command of a small bench, its output folder last."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "arms.json").write_text(json.dumps(ARMS))
    sizes = ["--steps", "4", "--batch_size", "4", "--validation", "4", "--test_rows", "6"]
    seeds = ["--seeds", "0,1", "--tuning_seeds", "7", "--reference", "plain"]
    where = ["--tasks", str(task_folder), "--model", str(model_folder), "--arms_file", str(folder / "arms.json")]
    return [*where, *sizes, *seeds, "--arms", ",".join(ARMS), "--out", str(folder / "out")]


@pytest.fixture(scope="module")
def ran(command):
    """Exit status and results of it."""
    status = main(command)
    return status, json.loads((Path(command[-1]) / "results.json").read_text())


def test_a_bench_runs_every_arm_and_reports_the_one_that_failed(ran, command):
    status, result = ran
    assert status == 1
    assert len(result["failed"]) == 2
    assert all(name.startswith("broken-final") and "task_ids holds 1" in why for name, why in result["failed"].items())
    found = {arm["arm"]["name"]: arm for arm in result["arms"]}
    assert {name: len(arm["runs"]) for name, arm in found.items()} == {"mine": 2, "plain": 2, "apart": 4, "broken": 0}
    assert result["machine"].keys() >= {"cpu", "workers"}
    assert result["versions"].keys() >= {"torch", "molora", "python"}
    assert result["settings"]["tasks"] == ["copy", "way"]
    losses = {float(rate): values for rate, values in found["mine"]["tuning"].items()}
    assert found["mine"]["learning_rate"] == statistics.best_rate(losses)[0]
    assert found["plain"]["tuning"] == {}
    own, other = (statistics.by_seed(found[name]["runs"]) for name in ("mine", "plain"))
    expected = [
        statistics.test_loss(own[seed][0]["test"]) - statistics.test_loss(other[seed][0]["test"]) for seed in (0, 1)
    ]
    assert found["mine"]["minus_plain"]["loss"]["values"] == pytest.approx(expected)
    assert (Path(command[-1]) / "results.png").exists() == (find_spec("matplotlib") is not None)


def test_final_runs_score_test_rows_and_others_do_not(ran, command):
    files = sorted((Path(command[-1]) / "runs").glob("*.json"))
    kinds = [json.loads(file.read_text())["settings"]["kind"] for file in files]
    assert sorted(kinds) == ["final"] * 8 + ["tuning"] * 2
    for file, kind in zip(files, kinds, strict=True):
        content = json.loads(file.read_text())
        assert ("test" in content) == (kind == "final")
        assert len(content["online"]) <= 4
        assert content["validation_loss"] > 0
    [one] = [json.loads(file.read_text()) for file in files if "mine-final-seed0" in file.name]
    for when in ("routing_initial", "routing_final"):
        assert len(one[when]) == 7 + 1
        assert one[when]["mean"]["active_experts"] == 2


def test_runs_that_are_done_are_not_run_again_and_earlier_results_stay(ran, command, capsys, monkeypatch):
    def none(*args, **kwargs):
        raise AssertionError("a run was started")

    out = Path(command[-1])
    before = (out / "results.json").read_bytes()
    monkeypatch.setattr(pool.Pool, "run", none)
    assert main([*command, "--report_only"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not run yet: broken-final") == 2
    for words in ("| plain | 0.01 |", "minus plain", "2 seeds", "chosen, at the edge", "dead_experts", " → "):
        assert words in shown
    assert (out / "results.json").read_bytes() == before
    again = json.loads((out / "results-2.json").read_text())
    assert again["arms"][0]["test_loss"] == ran[1]["arms"][0]["test_loss"]
    index = command.index("--arms")
    assert main([*command[: index + 1], "mine,plain,apart", *command[index + 2 :]]) == 0


def test_without_matplotlib_the_plot_is_left_out_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.draw(tmp_path / "plot.png", [], "lora") == "matplotlib is not installed"
    assert not any(tmp_path.iterdir())
