"""The quality bench: its figures by hand, its rows, its arms, and a whole bench on a tiny model."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

sys.path.append(str(Path(__file__).parent.parent))  # `benchmarks` is a folder of the repository, not of the package

from benchmarks.quality import arms, data, jobs, plot, pool, routing, scoring, statistics, tables, training
from benchmarks.quality.__main__ import main
from molora.errors import ConfigError, DataError
from molora.routing import affinity

WORDS = {"up": ["rise", "grow", "climb"], "down": ["fall", "sink", "drop"]}
MIXTURE = {"r": 2, "num_experts": 4, "lora_alpha": 4, "selection": "top_k", "top_k": 2, "target_modules": "all-linear"}
PLACE = training.Place("cpu", "float32", 0)


def _write_tasks(folder: Path, rows: int = 30) -> Path:
    """Two tasks: one with choices, one without; rows differ by a number."""
    for side, count in (("train", rows), ("test", 8)):
        (folder / side).mkdir(parents=True)
        lines: dict[str, list[str]] = {"way": [], "copy": []}
        for number in range(count):
            label = number % 2
            way = list(WORDS)[label]
            for task, asked, answer, choices in (
                ("way", f"{side} {WORDS[way][number % 3]} {number}?", way, list(WORDS)),
                ("copy", f"{side} {number * 7}", str(number * 7), []),
            ):
                messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                row = {"task": task, "id": f"{task}/{number}", "messages": messages, "choices": choices}
                row |= {"metric": "choice_norm" if choices else "exact", "label": label if choices else -1}
                lines[task].append(json.dumps(row))
        for task, own in lines.items():
            (folder / side / f"{task}.jsonl").write_text("\n".join(own) + "\n")
    return folder


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    return _write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _rows(folder: Path, **changed) -> data.TaskRows:
    given = {"per_task": 16, "max_length": 128, "validation": 5, "test_rows": 6}
    return data.load_rows(folder, ["copy", "way"], tiny_tokenizer(), **(given | changed))


def _asked(tasks: list[list[data.Item]]) -> set[tuple[int, ...]]:
    return {item.prompt for task in tasks for item in task}


# Rows


def test_no_row_serves_two_purposes(task_folder):
    rows = _rows(task_folder)
    pools, validation, test = (_asked(part) for part in (rows.pools, rows.validation, rows.test))
    assert [len(part) for part in (pools, validation, test)] == [32, 10, 12]
    assert not pools & validation
    assert not (pools | validation) & test


def test_training_rows_that_ask_what_test_rows_ask_are_left_out(tmp_path):
    folder = _write_tasks(tmp_path / "leak")
    scored = (folder / "test" / "copy.jsonl").read_text()
    with (folder / "train" / "copy.jsonl").open("a") as file:
        file.write(scored)
    rows = _rows(folder, per_task=33)
    # 30 of its own; the eight that were added are in none.
    assert len({item.prompt for item in rows.pools[0]}) == 25
    assert not _asked(rows.pools + rows.validation) & _asked(rows.test)


def test_streams_have_the_same_rows_in_another_order_for_every_seed(task_folder):
    rows = _rows(task_folder)
    first, again, other = (data.stream(rows, seed, 5) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [len(batch) for batch in first] == [5] * 6 + [2]
    assert _asked(first) == _asked(other)


def test_a_short_file_is_gone_through_again(task_folder):
    rows = _rows(task_folder, per_task=40)
    assert [len(pool) for pool in rows.pools] == [40, 40]
    assert len({item.prompt for item in rows.pools[0]}) == 25


def test_one_task_gets_its_rows_in_the_batches_they_were_in(task_folder):
    whole = data.stream(_rows(task_folder), 0, 4)
    parts = [data.only_task(whole, task) for task in (0, 1)]
    assert all(batch for part in parts for batch in part)
    assert [item for batch in parts[1] for item in batch] == [i for batch in whole for i in batch if i.task == 1]
    assert max(map(len, parts[0])) <= 4


@pytest.mark.parametrize(
    ("names", "changed", "words"),
    [
        (["copi"], {}, ["'copi'", "copy, way", "Did you mean 'copy'"]),
        (["copy", "copy"], {}, ["named twice"]),
        (["way"], {"validation": 30}, ["30 training rows", "--validation"]),
        (["way"], {"max_length": 10}, ["0 training rows", "--max_length"]),
    ],
)
def test_tasks_that_cannot_be_used_are_refused_with_what_to_do(task_folder, names, changed, words):
    given = {"per_task": 16, "max_length": 128, "validation": 5, "test_rows": 6} | changed
    with pytest.raises(DataError) as caught:
        data.load_rows(task_folder, data.found_tasks(task_folder, names), tiny_tokenizer(), **given)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train/TASK\.jsonl"):
        data.found_tasks(tmp_path, None)


# Figures of routing


def _sums(selected, weights=None, answers=None) -> affinity.Sums:
    selected = torch.tensor([selected], dtype=torch.float64)
    weights = selected if weights is None else torch.tensor([weights], dtype=torch.float64)
    answers = weights if answers is None else torch.tensor([answers], dtype=torch.float64)
    tokens = weights.sum(dim=-1)
    return affinity.Sums(weights, answers, selected, tokens, tokens * 0.5, tokens * 2.0)


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[4.0, 4.0], [4.0, 4.0]], 0.0),
        ([[9.0, 0.0], [0.0, 3.0]], 1.0),
        # H(3/8, 5/8) - (H(1/2) + H(1/4)) / 2
        ([[2.0, 2.0], [1.0, 3.0]], 0.954434 - (1.0 + 0.811278) / 2),
        ([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]], 2.0),
    ],
    ids=["alike", "apart", "in between", "four tasks apart"],
)
def test_information_is_that_of_hand_counts(counts, bits):
    assert affinity.mutual_information(torch.tensor(counts)).item() == pytest.approx(bits, abs=1e-5)


def test_load_counts_tasks_equally_however_many_tokens_they_have():
    found = affinity.load(torch.tensor([[90.0, 10.0], [1.0, 3.0]]))
    torch.testing.assert_close(found, torch.tensor([0.575, 0.425]))


@pytest.mark.parametrize(
    ("loads", "number"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0),
        ([0.97, 0.0, 0.03, 0.0], 2),
        ([0.9, 0.05, 0.025, 0.025], 0),
        ([1.0, 0.024, 0, 0], 3),
    ],
)
def test_an_expert_is_dead_below_a_tenth_of_an_even_share(loads, number):
    assert routing.dead(torch.tensor(loads)).item() == number


def test_figures_of_a_linear_follow_from_its_sums():
    found = routing.figures(
        _sums([[8, 8, 0, 0], [8, 8, 0, 0]], [[6, 2, 0, 0], [2, 6, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]])
    )
    expected = {
        "dead_experts": 2,
        "largest_load": 0.5,
        "dead_by_weight": 2,
        "largest_weight": 0.5,
        "active_experts": 2,
        "gate_entropy": 0.5,
        "router_entropy": 2,
        "information_answers": 1,
        "information": 1 - 0.811278,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, abs=1e-5)
    assert found.keys() == routing.FIGURES.keys()


def test_summary_has_every_linear_and_their_mean():
    found = routing.summary({("a",): _sums([[1, 1], [1, 1]]), ("b",): _sums([[1, 0], [1, 0]])})
    assert (found["a"]["dead_experts"], found["b"]["dead_experts"], found["mean"]["dead_experts"]) == (0, 1, 0.5)


@pytest.mark.parametrize(
    ("rows", "per_sequence", "expected"),
    [((1, 3), False, [[0, 1, 1]]), ((1, 6), False, [[0, 0, 1, 1, 1, 1]]), ((1, 1), True, [[1]])],
    ids=["one a token", "two a token", "one a sequence"],
)
def test_decisions_know_whether_they_are_about_an_answer(rows, per_sequence, expected):
    answers = torch.tensor([[False, True, True]])
    found = affinity.answers_of_decisions(answers, torch.Size(rows), per_sequence)
    assert found.int().tolist() == expected


def test_routing_of_rows_is_what_a_loop_over_recorded_tokens_counts(task_folder):
    from molora import record_routing

    rows = _rows(task_folder)
    model = training.adapted(tiny_llama(num_hidden_layers=1), MIXTURE, 0).eval()
    found = scoring.routing_of(model, rows.validation, PLACE)
    assert found is not None
    selected = torch.zeros(2, 4)
    answers = torch.zeros(2, 4)
    for task, items in enumerate(rows.validation):
        for item in items:
            with record_routing(model) as records, torch.no_grad():
                model(input_ids=torch.tensor([[*item.prompt, *item.answer]]))
            [own] = [record.routing for record in records if record.layer.endswith("q_proj")]
            selected[task] += own.selected[0].sum(dim=0)
            answers[task] += own.weights[0, len(item.prompt) :].sum(dim=0)
    [name] = [name for name in found if name.endswith("q_proj")]
    share = (selected / selected.sum(dim=1, keepdim=True)).mean(dim=0)
    assert found[name]["largest_load"] == pytest.approx(share.max().item(), abs=1e-4)
    assert found[name]["active_experts"] == 2
    assert found[name]["information_answers"] == pytest.approx(affinity.mutual_information(answers).item(), abs=1e-4)


# Training and scores


def test_answers_cost_the_same_padded_or_alone_and_as_the_model_says(task_folder):
    items = [item for task in _rows(task_folder).test for item in task]
    model = tiny_llama()
    losses, known, _ = training.answer_losses(model, PLACE.batch(items, 0))
    for item, own, count in zip(items, losses.sum(dim=1), known.sum(dim=1), strict=True):
        columns = item.columns()
        ids, labels = torch.tensor([columns["input_ids"]]), torch.tensor([columns["labels"]])
        expected = model(input_ids=ids, labels=labels).loss * len(item.answer)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        assert count == len(item.answer)


def test_training_is_the_loop_that_the_protocol_describes(task_folder):
    batches = data.stream(_rows(task_folder), 0, 8)
    model = training.adapted(tiny_llama(num_hidden_layers=1), {**MIXTURE, "init_weights": False}, 0)
    twin = training.adapted(tiny_llama(num_hidden_layers=1), {**MIXTURE, "init_weights": False}, 0)
    steps = training.train(model, batches, PLACE, learning_rate=1e-2, seed=0)
    own = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1.0, weight_decay=0.0)
    for at, batch in enumerate(batches):
        warm = math.ceil(0.06 * len(batches))
        turn = math.pi * (at - warm) / (len(batches) - warm)
        share = at / warm if at < warm else 0.05 + 0.95 * (1 + math.cos(turn)) / 2
        losses, known, _ = training.answer_losses(twin.train(), PLACE.batch(batch, 0))
        (losses.sum() / known.sum()).backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * share
        optimizer.step()
        optimizer.zero_grad()
        assert [task for task, _, _ in steps[at]] == [item.task for item in batch]
        torch.testing.assert_close(torch.tensor([loss for _, loss, _ in steps[at]]), losses.detach().sum(dim=1))
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4, msg=name)  # Adam blows rounding up
    assert not model.training


def test_an_expert_per_task_learns_from_its_rows_only(task_folder):
    fields = next(arm for arm in arms.BUILT_IN if arm.expert_per_task).fields
    fields = {**fields, "num_experts": 2, "r": 2, "target_modules": "all-linear"}
    model = training.adapted(tiny_llama(num_hidden_layers=1), fields, 0)
    before = {name: p.clone() for name, p in model.named_parameters() if "molora_A" in name}
    batches = data.only_task(data.stream(_rows(task_folder), 0, 8), 0)
    training.train(model, batches, PLACE, learning_rate=1e-2, seed=0, experts=2)
    for name, parameter in model.named_parameters():
        if "molora_A" in name:
            assert not torch.equal(parameter[:2], before[name][:2])
            assert torch.equal(parameter[2:], before[name][2:])
    found = scoring.routing_of(model, _rows(task_folder).validation, PLACE, experts=2)
    assert found is not None
    assert found["mean"]["information"] == pytest.approx(1.0)
    assert found["mean"]["active_experts"] == 1


def test_scores_are_those_of_each_row_alone(task_folder):
    rows = _rows(task_folder)
    model = training.adapted(tiny_llama(num_hidden_layers=1), {**MIXTURE, "init_weights": False}, 0).eval()
    found = scoring.score(model, rows.test, PLACE)
    for task, own in zip(rows.test, found, strict=True):
        for at, item in enumerate(task):
            sums = []
            for ids in item.choices or (item.answer,):
                logits = model(input_ids=torch.tensor([[*item.prompt, *ids]])).logits[0, len(item.prompt) - 1 : -1]
                chosen = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])
                sums.append(chosen.sum().item())
            right = sums[max(item.label, 0)]
            assert own["nll"][at] == pytest.approx(-right, abs=1e-4)
            assert own["tokens"][at] == len(item.answer)
            by_length = [value / n for value, n in zip(sums, item.characters, strict=False)]
            expected = int(by_length.index(max(by_length)) == item.label) if item.choices else None
            assert own["choice"][at] == expected
    assert {item.by_length for item in rows.test[1]} == {True}


def test_exact_match_needs_every_token(task_folder):
    item = _rows(task_folder).test[0][0]
    model = tiny_llama()
    answer = []
    for _ in range(3):
        logits = model(input_ids=torch.tensor([[*item.prompt, *answer]])).logits[0, -1]
        answer.append(int(logits.argmax()))
    right = data.Item(0, item.prompt, tuple(answer))
    wrong = data.Item(0, item.prompt, (answer[0], answer[1], (answer[2] + 1) % 100))
    assert scoring.score(model, [[right, wrong]], PLACE)[0]["exact"] == [1, 0]


@pytest.mark.parametrize(
    ("steps", "loss"),
    [
        ([[(0, 9.0, 1), (1, 9.0, 1)], [(0, 4.0, 2), (0, 2.0, 1), (1, 3.0, 1)]], 2.5),
        ([[(1, 9.0, 1)], [(1, 4.0, 2)]], 2.0),
        ([[(0, 9.0, 1), (1, 9.0, 1)], [(0, 4.0, 2)]], None),
    ],
    ids=["last half, tasks equal", "one task only", "a task that did not come again"],
)
def test_online_loss_by_hand(steps, loss):
    assert training.online_loss(steps, 2) == loss


# Statistics


def _scored(nll: list[float], tokens: list[int]) -> dict[str, list]:
    return {"nll": nll, "tokens": tokens, "exact": [1] * len(nll), "choice": [None] * len(nll)}


def test_differences_are_paired_on_rows_and_tasks_count_equally():
    own = [_scored([1.0, 2.0], [1, 3]), _scored([5.0], [1])]
    other = [_scored([2.0, 4.0], [1, 3]), _scored([4.0], [1])]
    assert statistics.test_loss(own) == pytest.approx((0.75 + 5) / 2)
    assert statistics.difference(own, other) == pytest.approx([-0.75, 1.0])
    # Task 0: rows differ by -1 and -2, of which a mean of -0.75 a token explains -0.75 and -2.25; two rows, one degree
    # of freedom. Task 1: one row tells no error.
    assert statistics.row_error(own, other) == pytest.approx(math.sqrt(0.25**2 * 2 / 16 * 2) / 2)
    with pytest.raises(ValueError, match="paired"):
        statistics.difference(own, [_scored([2.0, 4.0], [1, 2]), other[1]])


def test_the_error_is_over_seeds():
    found = statistics.over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert found.text() == "2.000 ± 0.577"
    assert statistics.over_seeds([1.0]).text(sign=True) == "+1.000"


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1e-3: [2.0, 3.0], 2e-3: [1.0, 2.0], 4e-3: [9.0, 0.1]}, (2e-3, False)),
        ({1e-3: [1.0], 2e-3: [2.0]}, (1e-3, True)),
        ({1e-3: [1.0]}, (1e-3, False)),
    ],
)
def test_the_learning_rate_with_the_least_mean_loss_is_chosen_and_an_edge_is_said(losses, expected):
    assert statistics.best_rate(losses) == expected


@pytest.mark.parametrize(
    ("seeds", "words"), [(1, ["1 seed ", "no error over seeds"]), (3, ["3 seeds", "50%"]), (9, ["9 seeds", "25%"])]
)
def test_the_note_says_how_well_the_error_is_known(seeds, words):
    found = tables.note([tables.Outcome("lora", seeds={seed: [] for seed in range(seeds)})])
    assert [word for word in words if word not in found] == []


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
    base, known, rows = tiny_llama(num_hidden_layers=1), arms.read_arms(None), _rows(task_folder)
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
