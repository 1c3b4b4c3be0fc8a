"""Several examples in one row: each keeps its task, its balance and its gradients, or is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset
from kinds import gradients
from peft import get_peft_model
from transformers import DataCollatorWithFlattening, TrainingArguments
from trl import SFTConfig, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from molora import MoLoraConfig, MoloraError
from molora.routing.inputs import scopes
from molora.routing.record import record_routing
from molora.trainers import MoLoraSFTTrainer, MoLoraTrainer
from molora.trainers.column_mixin import _of_tokens
from molora.trainers.columns import ColumnCollator

BLOCKS = r".*\.layers\.\d+"
LENGTHS = (5, 9, 7, 12, 3, 6, 4, 8)
SETTINGS = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
}


def task_of(token: int) -> int:
    """Tokens say the task they are about: 0 below 40, 1 below 70, 2 above."""
    return (token >= 40) + (token >= 70)


def rows(**extra) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index, length in enumerate(LENGTHS):
        start = (10, 40, 70)[index % 3]
        ids = torch.randint(start, start + 25, (length,), generator=generator).tolist()
        row = {"input_ids": ids, "labels": [-100, -100, *ids[2:]], "task_ids": index % 3}
        examples.append({**row, **{name: make(row) for name, make in extra.items()}})
    return Dataset.from_list(examples)


def adapted(preset="mole", **overrides):
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": "all-linear", "init_weights": False, **overrides}
    return get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))


def by_task(preset="moelora", **overrides):
    fields = {"moelora": {"router_dim": 5}, "becotta": {"target_modules": BLOCKS}}.get(preset, {})
    return adapted(preset, num_tasks=3, **{**fields, **overrides})


def sft(folder, model, train=None, **arguments):
    settings = {"output_dir": str(folder), "per_device_train_batch_size": 8, **SETTINGS, **arguments}
    train = rows() if train is None else train
    return MoLoraSFTTrainer(
        model, args=SFTConfig(**settings), train_dataset=train, processing_class=tiny.tiny_tokenizer()
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


FREE = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
FREE_BY_EIGHT = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)
PADDED = DataCollatorForLanguageModeling(pad_token_id=0)
SHORT = [{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}]
PACKED = [{"input_ids": [5, 6, 7], "seq_lengths": [2, 1]}, {"input_ids": [8, 9], "seq_lengths": [2]}]
AGAIN = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [8, 9], "position_ids": [0, 1]}]
LAYOUTS = {
    "padded rows are one example each": (PADDED, SHORT, None),
    "padding-free": (FREE, SHORT, [[0, 1, -1], [2, 3, 4]]),
    "padding-free, filled up": (FREE_BY_EIGHT, SHORT, [[0, 1, -1], [2, 3, 4]]),
    "one row, filled up": (FREE_BY_EIGHT, SHORT[1:], [[0, 1, 2]]),
    "packed": (FREE, PACKED, [[0, 1], [2, -1], [3, 4]]),
    "packed and padded": (PADDED, PACKED, [[0, 1], [2, -1], [3, 4]]),
    "packed with a mask": (PADDED, PACKED[::-1], [[0, 1], [3, 4], [5, -1]]),
    "positions that start anew": (PADDED, AGAIN, [[0, 1], [2, -1], [3, 4]]),
    "transformers' own flattening": (DataCollatorWithFlattening(), SHORT, [[0, 1, -1], [2, 3, 4]]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_the_batch_says_where_each_example_is(case):
    collator, examples, expected = LAYOUTS[case]
    batch = ColumnCollator(collator)(examples)
    assert (batch["packed_rows"].tolist() if "packed_rows" in batch else None) == expected


TASKS = {
    "padded": (PADDED, SHORT, [2, 1], [2, 1], None),
    "padding-free": (FREE, SHORT, [2, 1], [2, 1], [[2, 2, 1, 1, 1]]),
    "filled up": (FREE_BY_EIGHT, SHORT, [2, 1], [2, 1], [[2, 2, 1, 1, 1, 0, 0, 0]]),
    "packed, a task for each token": (FREE, PACKED, [[2, 2, 1], [1, 1]], [2, 1, 1], [[2, 2, 1, 1, 1]]),
    "packed, a task for each row": (FREE, PACKED, [2, 1], [2, 2, 1], [[2, 2, 2, 1, 1]]),
    "padded, a task for each token": (PADDED, SHORT, [[2, 2], [1, 1, 1]], [2, 1], None),
}


@pytest.mark.parametrize("case", TASKS)
def test_examples_and_their_tokens_have_their_tasks(case):
    collator, examples, given, of_examples, of_tokens = TASKS[case]
    batch = ColumnCollator(collator)([{**row, "task_ids": tasks} for row, tasks in zip(examples, given, strict=True)])
    assert batch["task_ids"].tolist() == of_examples
    assert (batch["task_ids_of_tokens"].tolist() if "task_ids_of_tokens" in batch else None) == of_tokens


def test_scores_of_packed_examples_stand_at_their_tokens():
    batch = ColumnCollator(FREE_BY_EIGHT)(
        [{**SHORT[0], "expert_scores": [1, 2]}, {**SHORT[1], "expert_scores": [3, 4]}]
    )
    assert batch["expert_scores"].tolist() == [[[1, 2]] * 2 + [[3, 4]] * 3 + [[0, 0]] * 3]


def _dropping(rows):
    return {"input_ids": torch.tensor([row["input_ids"][:1] for row in rows])}


REFUSED = {
    "an example of two tasks": (
        FREE,
        [{**PACKED[0], "task_ids": [1, 2, 2]}],
        "changes within an example.*seq_lengths",
    ),
    "tokens that the collator drops": (_dropping, PACKED, "hold 5 tokens by their seq_lengths and the batch 2"),
    "a task too few": (FREE, [{**SHORT[1], "task_ids": [1, 1]}], r"\[2\] values in the rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_examples_that_cannot_be_told_apart_are_refused(case):
    collator, examples, message = REFUSED[case]
    with pytest.raises(MoloraError, match=message):
        ColumnCollator(collator)(examples)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_rows_are_packed_as_trl_packs_them_and_every_token_keeps_its_task(strategy, shuffle, tmp_path):
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 10, "shuffle_dataset": shuffle}
    plain = sft(tmp_path, adapted(), rows().remove_columns("task_ids"), **packing).train_dataset
    ours = sft(tmp_path, by_task(), **packing).train_dataset
    for column in ("input_ids", "labels", "seq_lengths"):
        assert ours[column][:] == plain[column][:]
    assert len(ours) < len(LENGTHS)
    assert [list(map(task_of, ids)) for ids in ours["input_ids"]] == ours["task_ids"][:]


def test_streamed_rows_and_scores_are_packed_too(tmp_path):
    train = rows(expert_scores=lambda row: [float(row["task_ids"]), 1.0]).remove_columns("task_ids")
    packing = {"packing": True, "max_length": 16}
    packed = list(sft(tmp_path, adapted(), train.to_iterable_dataset(), **packing).train_dataset)
    assert len(packed) < len(LENGTHS)
    for row in packed:
        assert row["expert_scores"] == [[float(task_of(token)), 1.0] for token in row["input_ids"]]


def test_a_dataset_handed_to_evaluate_keeps_its_tasks_too(tmp_path):
    trainer = sft(tmp_path, by_task(), packing=True, max_length=16, per_device_eval_batch_size=2)
    seen = []
    [scope] = scopes(trainer.model)
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append((kwargs["input_ids"], scope.inputs.task_ids)), with_kwargs=True
    )
    trainer.evaluate(rows())
    assert seen
    for ids, tasks in seen:
        assert [[task_of(token) for token in row] for row in ids.tolist()] == tasks.tolist()


LOSSES = {"load_balancing": 0.3, "router_z": 0.1, "router_entropy": 0.1}
MODELS = {
    "a router of tokens": lambda: adapted(routing_losses={**LOSSES, "mutual_information": 0.5}),
    "a router of tasks": lambda: by_task(selection="top_k", top_k=2, routing_losses={"load_balancing": 0.3}),
    "a table of tasks": lambda: by_task("polytropon", gate="sigmoid"),
    "a table of tasks with splits": lambda: by_task("polytropon-mhr", num_splits=2, gate="sigmoid"),
    "a router per domain": lambda: by_task("becotta", num_experts=3, routing_losses={}),
}
PACKINGS = {
    "packed": {"packing": True, "max_length": 64},
    "packed in several rows": {"packing": True, "max_length": 20},
    "padding-free": {"padding_free": True, "max_length": None},
}


SEVERAL = "packed in several rows"


@pytest.mark.parametrize(
    ("model", "packing"),
    [*((model, SEVERAL) for model in MODELS), *(("a router of tokens", name) for name in PACKINGS if name != SEVERAL)],
)
def test_packing_changes_no_gradient(model, packing, tmp_path, monkeypatch):
    """Neither the task's nor, with their default scope, those of the routing losses."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # noise that no two orders of tokens draw alike
    alone = sft(tmp_path, MODELS[model]())
    together = sft(tmp_path, MODELS[model](), **PACKINGS[packing])
    assert_same(gradients(alone), gradients(together))
    assert alone.packed_rows is None
    assert len(together.packed_rows) == len(together.task_ids) == len(LENGTHS)


def test_noise_of_a_task_is_drawn_once_and_not_for_each_token(tmp_path):
    model = by_task("polytropon")
    trainer = sft(tmp_path, model, packing=True, max_length=64)
    with record_routing(model) as records:
        trainer.train()
    for record in records:
        [weights] = record.routing.weights
        for example in trainer.packed_rows:
            own = weights[example[example >= 0]]
            assert torch.equal(own, own[:1].expand_as(own))
        assert len(weights.unique(dim=0)) == 3


def test_losses_see_packed_examples_without_task_ids_too(tmp_path):
    def trained(**packing):
        model = adapted(routing_losses={"load_balancing": 5.0})
        return gradients(sft(tmp_path, model, rows().remove_columns("task_ids"), **packing))

    assert_same(trained(), trained(packing=True, max_length=64))


def test_the_task_of_each_token_is_that_of_its_row():
    model = by_task().eval()
    ids = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    tasks = torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = model(input_ids=ids, task_ids=tasks).logits
        with _of_tokens(scopes(model), tasks.unsqueeze(1).expand(3, 6)):
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with _of_tokens(scopes(model), torch.zeros(3, 6, dtype=torch.long)):
            assert not torch.allclose(model(input_ids=ids).logits, expected)


def test_tasks_of_other_tokens_are_refused():
    model = by_task().eval()
    with _of_tokens(scopes(model), torch.zeros(1, 4, dtype=torch.long)), pytest.raises(MoloraError, match="per row"):
        model(input_ids=torch.full((1, 5), 7))


def test_tasks_no_adapter_knows_are_refused_in_packed_rows_too(tmp_path):
    train = rows().map(lambda row: {"task_ids": row["task_ids"] + 5})
    with pytest.raises(MoloraError, match="knows 0 to 2"):
        sft(tmp_path, by_task(), train, packing=True, max_length=64).train()


def test_wrapped_packing_is_refused_where_columns_would_belong_to_no_row(tmp_path):
    wrapped = {"packing": True, "packing_strategy": "wrapped", "max_length": 10}
    with pytest.raises(MoloraError, match=r"wrapped.*task_ids.*'bfd'"):
        sft(tmp_path, by_task(), **wrapped)
    trainer = sft(tmp_path, adapted(routing_losses=LOSSES), rows().remove_columns("task_ids"), **wrapped)
    trainer.train()
    assert trainer.packed_rows is None


@pytest.mark.parametrize(
    "packing", [*PACKINGS.values(), {"packing": True, "packing_strategy": "wrapped", "max_length": 9}]
)
def test_one_decision_for_all_examples_of_a_row_is_refused(packing, tmp_path):
    with pytest.raises(MoloraError, match=r"router_level='sequence'.*packing=False"):
        sft(tmp_path, adapted("smear"), rows().remove_columns("task_ids"), **packing)


def test_other_collators_that_flatten_are_refused_with_such_an_adapter_too(tmp_path):
    def trainer(preset):
        return MoLoraTrainer(
            adapted(preset),
            TrainingArguments(output_dir=str(tmp_path), **SETTINGS),
            data_collator=DataCollatorWithFlattening(),
            train_dataset=rows(),
        )

    with pytest.raises(MoloraError, match="router_level='sequence'"):
        trainer("smear").train()
    fine = trainer("mole")
    fine.train()
    assert len(fine.packed_rows) == len(LENGTHS)


def test_rows_that_were_packed_beforehand_need_no_preparation(tmp_path):
    spread = rows().map(lambda row: {"task_ids": [row["task_ids"]] * len(row["input_ids"])})
    trainer = sft(
        tmp_path,
        by_task(),
        pack_dataset(spread, 64, "bfd"),
        padding_free=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer.train()
    assert sorted(trainer.task_ids.tolist()) == sorted(index % 3 for index in range(len(LENGTHS)))
