"""Nothing is lost: a save that is killed at any moment costs no checkpoint, and the next run goes on from the last."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from saving_worker import parameters, run, tiny, trainer_for, watch

from molora import ConfigError, MoloraError
from molora.runfile import check_output_dir, load_run_file
from molora.trainers.checkpoints import is_whole, last_whole_checkpoint, put_back_replaced, what_is_missing

STATE = "trainer_state.json"


def cut(path):
    """Leave the first half of a file, as a full disk or a kill while it is written do."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def moments_of(folder, copies, action, when=lambda: True):
    """Copies of a folder before each change that an action makes to it: what a kill there would leave."""
    taken = []

    def seen(event, path):
        if when():
            taken.append(Path(shutil.copytree(folder, copies / str(len(taken)))))

    active = watch(folder, seen)
    action()
    active[0] = False
    return [*taken, folder]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps that keeps every checkpoint, and its parameters at the end."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = trainer_for(folder)
    trainer.train()
    return folder, parameters(trainer)


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Every moment of the third save of a run that keeps one checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(folder, save_total_limit=1, max_steps=3, lr_scheduler_type="constant")
    third = lambda: trainer.state.global_step == 3  # noqa: E731
    return moments_of(folder, tmp_path_factory.mktemp("moments"), trainer.train, third)


def test_at_every_moment_of_a_save_one_checkpoint_is_whole(moments):
    found = [Path(last_whole_checkpoint(moment)).name for moment in moments]
    assert found == sorted(found)
    assert set(found) == {"checkpoint-2", "checkpoint-3"}
    assert len(found) > 20
    assert sorted(path.name for path in moments[-1].glob("*checkpoint*")) == ["checkpoint-3"]


def test_a_half_written_file_does_not_count_whatever_the_moment(moments, tmp_path):
    needed = 0
    for index, (moment, following) in enumerate(pairwise(moments)):
        before = {path.relative_to(moment) for path in moment.rglob("*")}
        for path in (path.relative_to(following) for path in following.rglob("*")):
            if path in before or (following / path).is_dir() or not (following / "checkpoint-2").exists():
                continue
            copy = Path(shutil.copytree(following, tmp_path / f"{index}-{path.name}"))
            cut(copy / path)
            (copy / "checkpoint-3" / STATE).unlink(missing_ok=path.name != STATE)
            assert Path(last_whole_checkpoint(copy)).name == "checkpoint-2"
            needed += path.name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", STATE)
    assert needed >= 4


CUTS = {
    "nothing": (lambda folder: None, None),
    "no folder": (shutil.rmtree, "is no folder"),
    "no state": (lambda folder: (folder / STATE).unlink(), f"has no {STATE}, which is written last"),
    "half a state": (lambda folder: cut(folder / STATE), f"has a damaged {STATE}"),
    "empty state": (lambda folder: (folder / STATE).write_text(""), f"has a damaged {STATE}"),
    "another state": (lambda folder: (folder / STATE).write_text("[]"), f"has a damaged {STATE}"),
    "half an adapter": (
        lambda folder: cut(folder / "adapter_model.safetensors"),
        "has a damaged adapter_model.safetensors",
    ),
    "half an optimizer": (lambda folder: cut(folder / "optimizer.pt"), "has a damaged optimizer.pt"),
    "half a scheduler": (lambda folder: cut(folder / "scheduler.pt"), "has a damaged scheduler.pt"),
    "half a random state": (lambda folder: cut(folder / "rng_state.pth"), "has a damaged rng_state.pth"),
    "no adapter": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no weights"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "has no optimizer"),
    "no scheduler": (lambda folder: (folder / "scheduler.pt").unlink(), "has no scheduler"),
    "no random state": (lambda folder: (folder / "rng_state.pth").unlink(), "has no random state"),
    "only the model": (
        lambda folder: [(folder / name).unlink() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")],
        "has no optimizer",
    ),
    "a cut file that nothing needs": (lambda folder: cut(folder / "training_args.bin"), None),
}


@pytest.mark.parametrize("case", CUTS)
def test_what_is_missing_is_named(case, straight, tmp_path):
    harm, sentence = CUTS[case]
    folder = Path(shutil.copytree(straight[0] / "checkpoint-2", tmp_path / "checkpoint-2"))
    harm(folder)
    assert what_is_missing(folder) == sentence
    assert is_whole(folder) is (sentence is None)


def test_a_checkpoint_of_another_trainer_may_hold_only_the_model(straight, tmp_path):
    folder = Path(shutil.copytree(straight[0] / "checkpoint-2", tmp_path / "checkpoint-2"))
    state = json.loads((folder / STATE).read_text())
    (folder / STATE).write_text(json.dumps({**state, "stateful_callbacks": {}}))
    assert is_whole(folder)
    (folder / "optimizer.pt").unlink()
    assert what_is_missing(folder) == "has no optimizer"
    for name in ("scheduler.pt", "rng_state.pth"):
        (folder / name).unlink()
    assert is_whole(folder)


def copied(straight, tmp_path):
    return Path(shutil.copytree(straight[0], tmp_path / "run"))


@pytest.mark.parametrize("left", ["no state", "half a state", "half an adapter", "no optimizer"])
def test_true_resumes_the_last_whole_checkpoint_and_names_the_skipped(left, straight, tmp_path, caplog):
    folder = copied(straight, tmp_path)
    shutil.rmtree(folder / "checkpoint-4")
    harm, sentence = CUTS[left]
    harm(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "stale.txt").write_text("of the killed save")
    (folder / "checkpoint-x").mkdir()
    trainer = trainer_for(folder)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-2, the last whole checkpoint: checkpoint-3 {sentence}" in caplog.text
    assert_equal(parameters(trainer), straight[1])
    assert is_whole(folder / "checkpoint-3")
    assert not (folder / "checkpoint-3" / "stale.txt").exists()


def test_a_run_with_nothing_whole_says_so(straight, tmp_path):
    with pytest.raises(MoloraError, match=r"there is no whole checkpoint in .*Train from the start"):
        trainer_for(tmp_path / "new").train(resume_from_checkpoint=True)
    folder = copied(straight, tmp_path)
    for checkpoint in folder.glob("checkpoint-*"):
        (checkpoint / STATE).unlink()
    with pytest.raises(
        MoloraError, match=r"no whole checkpoint in .*: checkpoint-4 has no trainer_state.*checkpoint-1"
    ):
        trainer_for(folder).train(resume_from_checkpoint=True)


def test_a_broken_checkpoint_is_refused_and_the_last_whole_one_named(straight, tmp_path):
    folder = copied(straight, tmp_path)
    cut(folder / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(MoloraError, match=r"checkpoint-4': it has a damaged optimizer.pt.*one is '.*checkpoint-3'"):
        trainer_for(folder).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    with pytest.raises(MoloraError, match="checkpoint-9': it is no folder"):
        trainer_for(folder).train(resume_from_checkpoint=folder / "checkpoint-9")


def test_no_resume_trains_from_the_start(straight, tmp_path):
    for nothing in (None, False):
        trainer = trainer_for(tmp_path / str(nothing), save_strategy="no")
        trainer.train(resume_from_checkpoint=nothing)
        assert_equal(parameters(trainer), straight[1])


@pytest.fixture(scope="module")
def processes():
    """Processes that start with the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saving_worker"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        yield context


def ended(processes, *args, **kwargs):
    process = processes.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    ("before", "last"),
    [
        ("_saving/adapter_config.json", "checkpoint-2"),
        (f"checkpoint-3/{STATE}", "checkpoint-2"),
        ("/checkpoint-2", "checkpoint-3"),
    ],
    ids=["writing the adapter", "writing the state", "rotating"],
)
def test_a_process_that_is_killed_while_saving_is_resumed(before, last, processes, straight, tmp_path):
    folder, end = tmp_path / "run", tmp_path / "end.pt"
    assert ended(processes, folder, end, kill_before=before, save_total_limit=1) == -signal.SIGKILL
    assert not end.exists()
    assert Path(last_whole_checkpoint(folder)).name == last
    assert ended(processes, folder, end, resume=True, save_total_limit=1) == 0
    assert_equal(torch.load(end), straight[1])
    assert [path.name for path in folder.glob("*checkpoint-*")] == ["checkpoint-4"]


def test_a_process_that_is_killed_from_outside_is_resumed(processes, straight, tmp_path):
    folder, end = tmp_path / "run", tmp_path / "end.pt"
    process = processes.Process(target=run, args=(folder, end))
    process.start()
    while not (folder / "checkpoint-2").exists() and process.is_alive():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert ended(processes, folder, end, resume=True) == 0
    assert_equal(torch.load(end), straight[1])


def test_a_whole_checkpoint_is_there_while_another_of_its_step_replaces_it(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0] / "checkpoint-3", folder / "checkpoint-3")
    (folder / "checkpoint-3" / "stale.txt").write_text("of the earlier run")
    trainer = trainer_for(folder, save_steps=3, max_steps=3)
    taken = moments_of(folder, tmp_path / "moments", trainer.train, lambda: trainer.state.global_step == 3)
    found = [Path(last_whole_checkpoint(moment)).name for moment in taken]
    assert found[0] == found[-1] == "checkpoint-3"
    assert "_replaced-checkpoint-3" in found
    for moment, name in zip(taken, found, strict=True):
        stale = (moment / name / "stale.txt").exists()
        put_back_replaced(moment)
        assert [path.name for path in moment.glob("*checkpoint*")] == ["checkpoint-3"]
        assert is_whole(moment / "checkpoint-3")
        assert (moment / "checkpoint-3" / "stale.txt").exists() is stale
    assert not (folder / "checkpoint-3" / "stale.txt").exists()


def test_a_run_resumes_from_a_checkpoint_that_was_being_replaced(straight, tmp_path):
    folder = copied(straight, tmp_path)
    os.replace(folder / "checkpoint-4", tmp_path / "unused")
    os.replace(folder / "checkpoint-3", folder / "_replaced-checkpoint-3")
    (folder / "checkpoint-3").mkdir()
    trainer = trainer_for(folder)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(parameters(trainer), straight[1])
    assert {path.name for path in folder.glob("*checkpoint-*")} == {f"checkpoint-{step}" for step in range(1, 5)}


def test_rotation_keeps_no_broken_checkpoint_in_place_of_a_whole_one(straight, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0] / "checkpoint-1", folder / "checkpoint-1")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "adapter_model.safetensors").write_text("half")
    trainer = trainer_for(folder, save_total_limit=1, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert {path.name for path in folder.glob("*checkpoint-*")} == {"checkpoint-2", "_broken-checkpoint-9"}
    assert is_whole(folder / "checkpoint-2")
    assert (folder / "_broken-checkpoint-9" / "adapter_model.safetensors").exists()


def test_the_state_is_written_when_every_process_has_saved_its_own(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path, max_steps=1)
    seen = []

    def wait():
        seen.append({path.name for path in (tmp_path / "checkpoint-1").glob("*")})

    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", wait)
    trainer.train()
    last = seen[-1]
    assert "rng_state.pth" in last
    assert STATE not in last


SETTINGS = {
    "only the model": {"save_only_model": True},
    "best": {
        "save_strategy": "best",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "save_total_limit": 1,
    },
    "best at the end": {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "save_total_limit": 1,
    },
    "two kept": {"save_total_limit": 2},
}


def test_resuming_from_the_model_alone_warns_that_the_run_is_another(tmp_path, caplog):
    trainer_for(tmp_path, save_only_model=True).train()
    with caplog.at_level(logging.WARNING):
        trainer_for(tmp_path, save_only_model=True, max_steps=5).train(resume_from_checkpoint=True)
    assert "checkpoint-4 holds only the model" in caplog.text


@pytest.mark.parametrize("case", SETTINGS)
def test_other_ways_of_saving_leave_whole_checkpoints_too(case, tmp_path):
    trainer = trainer_for(tmp_path, **SETTINGS[case])
    trainer.train()
    checkpoints = list(tmp_path.glob("*checkpoint-*"))
    assert checkpoints
    assert all(map(is_whole, checkpoints)), {path.name: what_is_missing(path) for path in checkpoints}
    if case == "best at the end":  # the loss falls, so the first is best, and a run that has ended keeps only that
        assert [path.name for path in checkpoints] == ["checkpoint-1"]
        resumed = trainer_for(tmp_path, **SETTINGS[case])
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.best_model_checkpoint.endswith("checkpoint-1")
        assert_equal(parameters(resumed), parameters(trainer))


def test_saving_an_adapter_over_another_leaves_whole_files_at_every_moment(tmp_path):
    folder = tmp_path / "adapter"
    trainer = trainer_for(folder)
    trainer.save_model()
    (folder / "README.md").write_text(f"{(folder / 'README.md').read_text()}\nWords of the author.\n")
    (folder / "notes.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += parameter.requires_grad
    trainer.model.peft_config["default"].temperature = 2.0
    places = {path.name: path.stat().st_ino for path in folder.iterdir()}
    taken = moments_of(folder, tmp_path / "moments", trainer.save_model)
    # Written in place, a file would be half of itself for a while.
    assert [path.name for path in folder.iterdir() if path.stat().st_ino == places[path.name]] == ["notes.txt"]
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == after.keys()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {n for n in before if before[n] != after[n]}
    assert "Words of the author." in (folder / "README.md").read_text()
    for moment in taken:
        for path in moment.glob("*.*"):
            assert path.is_dir() or path.read_bytes() in (before[path.name], after[path.name])
    loaded = PeftModel.from_pretrained(tiny.tiny_llama(), folder)
    saved = {name: p for name, p in loaded.named_parameters() if "molora_" in name}
    assert_equal(parameters(trainer), saved)


def test_a_save_that_fails_leaves_the_adapter_as_it_was(tmp_path, monkeypatch):
    trainer = trainer_for(tmp_path)
    trainer.save_model()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer.processing_class, "save_pretrained", full)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += parameter.requires_grad
    with pytest.raises(OSError, match="no space"):
        trainer.save_model()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_file_that_resumes_names_what_is_not_whole_before_anything_is_loaded(straight, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    out = tmp_path / "out"
    text = f"model_name_or_path: smollm2-135m-instruct\npreset: mole\ntarget_modules: all-linear\noutput_dir: {out}\n"
    (tmp_path / "run.yaml").write_text(f"{text}datasets: [{{path: {rows}, task: one}}]\n")

    def check(resume):
        check_output_dir(load_run_file("run.yaml", [f"resume_from_checkpoint={resume}"]))

    shutil.copytree(straight[0] / "checkpoint-2", out / "checkpoint-2")
    shutil.copytree(straight[0] / "checkpoint-3", out / "checkpoint-3")
    cut(out / "checkpoint-3" / STATE)
    check("true")
    check("~/out/checkpoint-2")
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint: cannot resume from .*it has a damaged trainer_state.*checkpoint-2"
    ):
        check("out/checkpoint-3")
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint: there is no whole checkpoint in .*: checkpoint-3 has a damaged"
    ):
        check("true")
