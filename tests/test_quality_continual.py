"""The continual studies of the quality bench: stages, growth, replay, composition, and the command."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks.quality import composed, data, shares, staged, studies, training
from benchmarks.quality.arms import Arm, read_arms
from benchmarks.quality.continual import main
from benchmarks.quality.jobs import Bench
from benchmarks.quality.pool import Pool
from molora.errors import MoloraError
from molora.routing.inputs import routing_inputs

PLACE = training.Place("cpu", "float32", 0)
NAMES = ["upper", "double", "last"]
LORA = Arm("lora", {"preset": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
GROWN = Arm("grown", {**studies.GROWN.fields, "r": 2, "target_modules": "all-linear"})
FROZEN = Arm("grown", {**GROWN.fields, "freeze_router": True})


ALPHABETS = {"upper": "abcdefghij", "double": "0123456789", "last": "ABCDEFGHIJ"}
"""Tasks differ in all their characters, so that one token tells the task even to a random model."""


def _asked(side: str, task: str, number: int) -> tuple[str, str]:
    code = str(number * 7 + (10101 if side == "train" else 50505)) * 3
    word = "".join(ALPHABETS[task][int(digit)] for digit in code)
    answer = {"upper": word[-3:].upper(), "double": word[:2] * 2, "last": word[-1]}[task]
    return word, answer


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for side, count in (("train", 24), ("test", 5)):
        (folder / side).mkdir()
        for task in NAMES:
            lines = []
            for number in range(count):
                asked, answer = _asked(side, task, number)
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                lines.append(json.dumps({"task": task, "id": f"{task}/{number}", "messages": messages}))
            (folder / side / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def rows(task_folder):
    return data.load_rows(task_folder, NAMES, tiny_tokenizer(), per_task=16, max_length=128, validation=4, test_rows=5)


@pytest.fixture(scope="module")
def base():
    return tiny_llama(num_hidden_layers=1).requires_grad_(False)


def _job(arm=LORA, stages=((0,), (1,), (2,)), **more):
    return staged.StagedJob(arm, 0, 1e-2, "sequence", stages=stages, **more)


def _bench(rows) -> Bench:
    return Bench("tiny", "float32", "cpu", rows.names, rows.digest, 4, 4, 128, 4, 5)


# Stages


def test_a_stage_sees_the_rows_of_its_tasks_and_no_others(rows):
    job = _job(stages=((0, 2), (1,)))
    first, second = (staged.stage_batches(job, rows, at, 4) for at in (0, 1))
    assert {item.task for batch in first for item in batch} == {0, 2}
    assert {item.task for batch in second for item in batch} == {1}
    assert ([len(batch) for batch in first], [len(batch) for batch in second]) == ([4] * 8, [4] * 4)
    assert job.seen() == [[0, 2], [0, 1, 2]]


def test_a_scarce_task_has_so_many_rows_in_every_pass(rows):
    job = _job(stages=((0, 1),), limits=(3, 100, 100), passes=2)
    items = [item for batch in staged.stage_batches(job, rows, 0, 4) for item in batch]
    assert sum(item.task == 0 for item in items) == 6
    assert {item.prompt for item in items if item.task == 0} == {item.prompt for item in rows.pools[0][:3]}
    assert sum(item.task == 1 for item in items) == 32


def test_replay_puts_rows_of_all_earlier_tasks_in_the_place_of_new_ones(rows):
    job = _job(replay=0.25)
    plain = staged.stage_batches(job, rows, 0, 8)
    assert {item.task for batch in plain for item in batch} == {0}
    mixed = staged.stage_batches(job, rows, 2, 8)
    assert len(mixed) == len(plain)
    for batch in mixed:
        assert [item.task == 2 for item in batch] == [True] * 6 + [False] * 2
        assert len({item.prompt for item in batch}) == 8
    new = [item.prompt for batch in mixed for item in batch[:6]]
    assert len(set(new)) == len(new)
    old = [*rows.pools[0], *rows.pools[1]]
    tried = [batch for seed in range(5) for batch in staged.with_replay(mixed, old, 2, seed)]
    drawn = {item.task for batch in tried for item in batch[-2:]}
    assert drawn == {0, 1}


@pytest.mark.parametrize(("share", "size", "number"), [(0.25, 8, 2), (0.25, 2, 1), (0.01, 8, 1), (1.0, 4, 3)])
def test_a_batch_has_at_least_one_old_row_and_one_new(share, size, number):
    assert staged.replayed_rows(share, size) == number


def _router_rows(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "molora_router" in name}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_growth_leaves_old_experts_and_rows_as_they_are_and_sends_new_rows_to_new_experts(rows, base, level):
    arm = Arm("grown", {**FROZEN.fields, "router_level": level})
    job = _job(arm, grows=2, freezes=True)
    model = training.adapted(base, arm.fields, 0).eval()
    first, second = (staged.stage_batches(job, rows, at, 4) for at in (0, 1))
    staged.prepare(model, job, 0, first, PLACE)
    training.train(model, first, PLACE, learning_rate=2.5e-3, seed=0)
    old_rows = _router_rows(model)
    layers = [m for m in model.modules() if hasattr(m, "molora_plan")]
    old = [[matrix.detach().clone() for matrix in layer.matrices("default")] for layer in layers]
    staged.prepare(model, job, 1, second, PLACE)
    calibrated = _router_rows(model)
    found = shares.expert_shares(model, rows.pools, PLACE)
    assert found is not None
    assert sum(found[1][2:]) > 0.6
    assert sum(found[1][2:]) > sum(found[0][2:]) + 0.15
    training.train(model, second, PLACE, learning_rate=2.5e-3, seed=1)
    for layer, (down, up) in zip(layers, old, strict=True):
        new_down, new_up = layer.matrices("default")[:2]
        assert torch.equal(new_down[:4], down)
        assert torch.equal(new_up[:, :4], up)
        assert new_up[:, 4:].abs().sum() > 0
    for name, value in _router_rows(model).items():
        assert torch.equal(value, calibrated[name])
        assert torch.equal(value[:2], old_rows[name])


def test_routers_that_are_not_frozen_go_on_learning(rows, base):
    job = _job(GROWN, grows=2)
    model = training.adapted(base, GROWN.fields, 0).eval()
    for at in (0, 1):
        batches = staged.stage_batches(job, rows, at, 4)
        staged.prepare(model, job, at, batches, PLACE)
        before = _router_rows(model)
        training.train(model, batches, PLACE, learning_rate=1e-2, seed=at)
        assert any(not torch.equal(value, before[name]) for name, value in _router_rows(model).items())


def test_a_run_scores_all_tasks_seen_so_far_after_every_stage(rows, base):
    found = _job(FROZEN, grows=2, freezes=True).run(_bench(rows), base, rows, PLACE)
    assert [[loss is not None for loss in stage["losses"]] for stage in found["stages"]] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert len(found["before"]) == 3
    assert found["stages"][0]["losses"][0] < found["before"][0]
    assert [len(own) for own in found["shares"]] == [6] * 3
    assert [sum(own) for own in found["shares"]] == pytest.approx([1] * 3, abs=1e-3)
    # Six experts of rank 2, and their rows and offsets.
    linears = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    routers = sum(6 * (linear.in_features + 1) for linear in linears)
    banks = sum(12 * (linear.in_features + linear.out_features) for linear in linears)
    assert found["parameters"] == {"all": banks + routers, "router": routers}
    json.dumps(found)


def test_a_plain_lora_has_no_shares(rows, base):
    model = training.adapted(base, LORA.fields, 0).eval()
    assert shares.expert_shares(model, rows.validation, PLACE) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"stages": ((0, 1), (2,))},
        {"limits": (3, 4, 5)},
        {"passes": 2},
        {"grows": 1},
        {"freezes": True},
        {"replay": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_one_changed_setting_is_another_run(rows, tmp_path, changed):
    bench = _bench(rows)
    assert _job(**changed).file(tmp_path, bench) != _job().file(tmp_path, bench)
    assert _job().file(tmp_path, bench) == _job().file(tmp_path, bench)


# Studies


def _parts(**more) -> studies.Parts:
    given = {"arms": read_arms(None), "skeleton": tiny_llama(num_hidden_layers=1), "tasks": 3, "seeds": [0, 1]}
    return studies.Parts(**(given | {"rates": {}, "scarce_rows": 4} | more))


@pytest.mark.parametrize(
    ("study", "arms"),
    [
        ("sequence", ["lora", "replay", "grown", "grown-text", "grown-trained"]),
        ("added", ["lora", "replay", "grown", "grown-text", "lora-together", "molora-together"]),
        ("scarce", ["lora", "molora", "lora-alone"]),
        ("composed", ["lora-together", "lora-of-task"]),
    ],
)
def test_a_study_has_every_arm_on_every_seed(study, arms):
    jobs = studies.jobs_of([study], _parts(), None)
    each = 3 if study == "scarce" else 1
    for arm in arms:
        assert sorted(job.seed for job in jobs if job.arm.name == arm) == [0] * each + [1] * each
    assert {job.arm.name for job in jobs} == set(arms)
    assert {job.kind for job in jobs} == {study}


def test_a_rate_is_what_was_given_or_the_one_in_the_middle_of_the_arms_grid():
    known = read_arms(None)
    known["grown"] = replace(studies.GROWN, learning_rates=(2e-3,))
    jobs = studies.jobs_of(["sequence"], _parts(arms=known, rates={"grown": 7.0, "replay": 3.0}), None)
    found = {job.arm.name: job.learning_rate for job in jobs}
    assert found == {"lora": 1e-3, "replay": 3.0, "grown": 7.0, "grown-text": 2e-3, "grown-trained": 2e-3}
    [mixture] = {job.learning_rate for job in studies.jobs_of(["scarce"], _parts(), ["molora"])}
    assert mixture == 7.5e-4


def test_grown_mixtures_end_equally_large_in_both_studies():
    for study, start in (("sequence", 2), ("added", 4)):
        jobs = [job for job in studies.jobs_of([study], _parts(), None) if job.arm.name.startswith("grown")]
        assert {job.arm.fields["num_experts"] + job.grows * (len(job.stages) - 1) for job in jobs} == {6}
        assert {job.arm.fields["num_experts"] for job in jobs} == {start}


@pytest.mark.parametrize(
    ("study", "arms", "rates", "words"),
    [
        (["sequense"], None, {}, ["--study", "Did you mean 'sequence'"]),
        (["sequence"], ["growm"], {}, ["--arms", "Did you mean 'grown'"]),
        (["sequence"], None, {"lorra": 1.0}, ["--learning_rates", "Did you mean 'lora'"]),
    ],
)
def test_what_a_study_does_not_have_is_refused(study, arms, rates, words):
    with pytest.raises(MoloraError) as caught:
        studies.jobs_of(study, _parts(rates=rates), arms)
    assert [word for word in words if word not in str(caught.value)] == []


# Composition


@pytest.fixture(scope="module")
def loras(rows, base, tmp_path_factory):
    """A trained LoRA for each task, and its loss there."""
    folders = [tmp_path_factory.mktemp("loras") / name for name in NAMES]
    job = composed.ComposedJob(LORA, 0, 2e-2, "composed")
    losses = [job._train(task, folder, _bench(rows), base, rows, PLACE) for task, folder in enumerate(folders)]
    return folders, losses


@pytest.mark.parametrize("way", list(composed.WAYS))
def test_each_lora_is_an_expert_of_every_composed_model(rows, base, loras, way):
    folders, losses = loras
    model = composed.composed_model(base, folders, composed.WAYS[way], rows, PLACE, 0)
    for task, loss in enumerate(losses):
        with routing_inputs(model, expert_weights=torch.eye(3)[task]):
            nll = tokens = 0.0
            for item in rows.test[task]:  # `score` opens a block of its own inside
                batch = PLACE.batch([item], 0)
                own, known, _ = training.answer_losses(model, batch)
                nll, tokens = nll + own.sum().item(), tokens + known.sum().item()
        assert nll / tokens == pytest.approx(loss, abs=1e-4)


def test_a_calibrated_router_sends_each_task_to_its_own_lora(rows, base, loras):
    model = composed.composed_model(base, loras[0], composed.WAYS["calibrated"], rows, PLACE, 0)
    found = shares.expert_shares(model, rows.pools, PLACE)
    assert found is not None
    for task, own in enumerate(found):
        assert own[task] == max(own)
        assert own[task] > 0.45


# The command


@pytest.fixture(scope="module")
def command(task_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continual")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    broken = {"molora": {"router": "task", "num_tasks": 1, "selection": "top_k", "learning_rates": [0.01]}}
    (folder / "arms.json").write_text(json.dumps(broken))
    sizes = ["--steps", "2", "--batch_size", "4", "--test_rows", "3", "--validation", "3", "--scarce_rows", "4"]
    where = ["--tasks", str(task_folder), "--model", str(folder / "model"), "--task_names", "double,upper"]
    return [*where, *sizes, "--arms_file", str(folder / "arms.json"), "--out", str(folder / "out")]


def test_all_studies_run_and_what_fails_is_reported_and_what_is_done_is_not_done_again(command, capsys, monkeypatch):
    given = ["--study", "sequence,scarce,composed", "--arms", "lora,grown,molora,lora-of-task", "--seeds", "0"]
    assert main([*command, *given]) == 1
    capsys.readouterr()
    out = Path(command[-1])
    before = (out / "continual.json").read_bytes()
    result = json.loads(before)
    assert [name.split("-seed")[0] for name in result["failed"]] == ["molora-scarce"] * 2
    assert result["settings"]["tasks"] == ["double", "upper"]
    assert {study: len(runs) for study, runs in result["runs"].items()} == {"sequence": 2, "scarce": 2, "composed": 1}
    grown = next(run for run in result["runs"]["sequence"] if run["settings"]["arm"] == "grown")
    losses = [stage["losses"] for stage in grown["stages"]]
    forgotten = result["summaries"]["sequence"]["grown"]["first"]["mean"]
    assert forgotten == pytest.approx(losses[1][0] - losses[0][0])
    assert result["summaries"]["composed"].keys() == {"each alone", *composed.WAYS}
    assert result["summaries"]["scarce"].keys() == {"lora"}

    def none(*args, **kwargs):
        raise AssertionError("a run was started")

    monkeypatch.setattr(Pool, "run", none)
    assert main([*command, *given, "--report_only"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not run yet: molora-") == 2
    for words in ("## Sequence", "## Scarce", "## Composed", "| grown | 0.00075 |"):
        assert words in shown
    assert (out / "continual.json").read_bytes() == before
    assert (out / "continual-2.md").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--steps", "0"], ["--steps", "at least 1"]),
        (["--batch_size", "1"], ["--batch_size", "at least 2"]),
        (["--scarce_rows", "9"], ["--scarce_rows", "8 rows"]),
        (["--task_names", "upper"], ["'upper' alone", "at least two"]),
        (["--study", "scarse"], ["--study", "Did you mean 'scarce'"]),
        (["--seeds", ""], ["--seeds"]),
    ],
)
def test_a_mistake_in_the_command_ends_it_with_a_sentence(command, tmp_path, capsys, more, words):
    assert main([*command[:-1], str(tmp_path / "out"), *more]) == 1
    shown = capsys.readouterr().err
    assert [word for word in words if word not in shown] == []
    assert not (tmp_path / "out").exists()
