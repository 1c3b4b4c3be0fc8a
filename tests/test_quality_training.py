"""The quality bench: which rows serve which purpose, and training and scores against plain loops."""

from __future__ import annotations

import math

import pytest
import quality
import torch
from quality import MIXTURE, PLACE, rows_of, write_tasks
from tiny import tiny_llama, tiny_tokenizer

from benchmarks.quality import arms, data, scoring, training
from molora.errors import DataError

task_folder = quality.task_folder


def _asked(tasks: list[list[data.Item]]) -> set[tuple[int, ...]]:
    return {item.prompt for task in tasks for item in task}


# Rows


def test_no_row_serves_two_purposes(task_folder):
    rows = rows_of(task_folder)
    pools, validation, test = (_asked(part) for part in (rows.pools, rows.validation, rows.test))
    assert [len(part) for part in (pools, validation, test)] == [32, 10, 12]
    assert not pools & validation
    assert not (pools | validation) & test


def test_training_rows_that_ask_what_test_rows_ask_are_left_out(tmp_path):
    folder = write_tasks(tmp_path / "leak")
    scored = (folder / "test" / "copy.jsonl").read_text()
    with (folder / "train" / "copy.jsonl").open("a") as file:
        file.write(scored)
    rows = rows_of(folder, per_task=33)
    # 30 of its own; the eight that were added are in none.
    assert len({item.prompt for item in rows.pools[0]}) == 25
    assert not _asked(rows.pools + rows.validation) & _asked(rows.test)


def test_streams_have_the_same_rows_in_another_order_for_every_seed(task_folder):
    rows = rows_of(task_folder)
    first, again, other = (data.stream(rows, seed, 5) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert [len(batch) for batch in first] == [5] * 6 + [2]
    assert _asked(first) == _asked(other)


def test_a_short_file_is_gone_through_again(task_folder):
    rows = rows_of(task_folder, per_task=40)
    assert [len(pool) for pool in rows.pools] == [40, 40]
    assert len({item.prompt for item in rows.pools[0]}) == 25


def test_one_task_gets_its_rows_in_the_batches_they_were_in(task_folder):
    whole = data.stream(rows_of(task_folder), 0, 4)
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


# Training and scores


def test_answers_cost_the_same_padded_or_alone_and_as_the_model_says(task_folder):
    items = [item for task in rows_of(task_folder).test for item in task]
    model = tiny_llama()
    losses, known, _ = training.answer_losses(model, PLACE.batch(items, 0))
    for item, own, count in zip(items, losses.sum(dim=1), known.sum(dim=1), strict=True):
        columns = item.columns()
        ids, labels = torch.tensor([columns["input_ids"]]), torch.tensor([columns["labels"]])
        expected = model(input_ids=ids, labels=labels).loss * len(item.answer)
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
        assert count == len(item.answer)


def test_training_is_the_loop_that_the_protocol_describes(task_folder):
    batches = data.stream(rows_of(task_folder), 0, 8)
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
    batches = data.only_task(data.stream(rows_of(task_folder), 0, 8), 0)
    training.train(model, batches, PLACE, learning_rate=1e-2, seed=0, experts=2)
    for name, parameter in model.named_parameters():
        if "molora_A" in name:
            assert not torch.equal(parameter[:2], before[name][:2])
            assert torch.equal(parameter[2:], before[name][2:])
    found = scoring.routing_of(model, rows_of(task_folder).validation, PLACE, experts=2)
    assert found is not None
    assert found["mean"]["information"] == pytest.approx(1.0)
    assert found["mean"]["active_experts"] == 1


def test_scores_are_those_of_each_row_alone(task_folder):
    rows = rows_of(task_folder)
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
    item = rows_of(task_folder).test[0][0]
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
