"""Datasets of a run file: read, recognised, named, tokenized, mixed and batched as documented."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from tiny import CHAT_TEMPLATE, END, UNK, VOCABULARY, tiny_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from molora.data import (
    Example,
    Row,
    TaskCollator,
    TaskData,
    encode,
    encode_parts,
    examples_of,
    format_preview,
    load_tasks,
    mix,
    read_rows,
    supervised_tokens,
    tokenize_tasks,
)
from molora.errors import DataError

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
END_ID = VOCABULARY[END]


@dataclass(frozen=True)
class Spec:
    path: str
    name: str | None = None
    split: str | None = "train"
    task: str | None = None
    weight: float = 1.0
    max_samples: int | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_max_samples: int | None = None


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        file = tmp_path / name
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        file.write_text(content, encoding="utf-8")
        return str(file)

    return write_file


def texts(count, **columns):
    return [{"text": f"row {index}", **columns} for index in range(count)]


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"}'),
        ("a.jsonl", '\ufeff{"text": "x"}\r\n{"text": "y"}\r\n'),
        ("a.json", '[{"text": "x"},\n {"text": "y"}]'),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n'),
        ("a.csv", "text\nx\ny\n"),
        ("a.tsv", "text\tlabel\nx\t1\ny\t2\n"),
        ("a.txt", "x\ny\n"),
    ],
)
def test_every_local_format_gives_its_rows(write, monkeypatch, tmp_path, name, content):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert [row.values["text"] for row in read_rows(write(name, content))] == ["x", "y"]


def test_a_line_separator_inside_a_string_does_not_end_the_row(write):
    assert read_rows(write("a.jsonl", '{"text": "one\u2028two"}\n'))[0].values["text"] == "one\u2028two"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON .* column 10"),
        ("a.jsonl", '{"text": "x"}\n[1]x\n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n"y"\n', r"a\.jsonl:2: expected an object .* got str"),
        ("a.json", '[{"text": "x"}, 3]', r"a\.json: item 2: expected an object .* got int"),
        ("a.json", '[{"text": "x"},\n {]', r"a\.json: not valid JSON .* line 2"),
        ("a.jsonl", "\n \n", r"a\.jsonl: the file is empty"),
        ("a.json", "[]", r"a\.json: the file is empty"),
        ("a.docx", "x", r"files ending in '\.docx' cannot be read; known endings are \.jsonl"),
    ],
)
def test_a_malformed_file_is_reported_with_its_place(write, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(name, content))


def test_a_missing_file_is_reported_with_the_closest_name(write, tmp_path):
    write("sentiment.jsonl", texts(1))
    with pytest.raises(DataError, match=r"no such file or folder\. Did you mean 'sentiment\.jsonl'"):
        read_rows(str(tmp_path / "sentimant.jsonl"))


def test_a_slice_of_a_plain_file_is_refused(write):
    with pytest.raises(DataError, match="use `max_samples`"):
        read_rows(write("a.jsonl", texts(3)), split="train[:2]")


def test_an_unreachable_hub_dataset_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"^nobody/nothing: cannot load split 'train': [^\n]+\.$"):
        read_rows("nobody/nothing")


# Shapes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [USER, ANSWER]}, [([USER], "yo")]),
        (
            {"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "bye"}]},
            [([USER], "yo"), ([USER, ANSWER, USER], "bye")],
        ),
        ({"prompt": "p", "completion": "c"}, [("p", "c")]),
        ({"prompt": [USER], "completion": [ANSWER]}, [([USER], "yo")]),
        ({"prompt": [USER], "completion": "yo"}, [([USER], "yo")]),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, [([USER, ANSWER, USER], "yo")]),
        ({"text": "t"}, [(None, "t")]),
        ({"messages": None, "text": "t"}, [(None, "t")]),
        ({"text": "t", "label": 3}, [(None, "t")]),
    ],
)
def test_each_shape_becomes_its_examples(values, expected):
    assert examples_of(Row(values, "f:1"), "task") == [Example(p, c, "task") for p, c in expected]


@pytest.mark.parametrize(
    ("extra", "label"),
    [({"label": 1}, 1), ({}, 1), ({"label": -1}, 1), ({"label": None}, 1)],
)
def test_choices_get_their_label(extra, label):
    row = Row({"prompt": "p", "completion": "b", "choices": ["a", "b"], **extra}, "f:1")
    assert examples_of(row, "t") == [Example("p", "b", "t", ("a", "b"), label)]


def test_choices_belong_to_the_last_turn():
    row = Row({"messages": [USER, ANSWER, USER, {"role": "assistant", "content": "b"}], "choices": ["a", "b"]}, "f:1")
    assert [example.choices for example in examples_of(row, "t")] == [(), ("a", "b")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [ANSWER, USER]}, "last message must be the assistant's, got role 'user'"),
        ({"messages": [ANSWER]}, "nothing prompts it"),
        ({"messages": []}, "`messages` must be a list of messages"),
        ({"messages": "hi"}, "`messages` must be a list of messages"),
        ({"messages": [{"from": "human"}]}, "message 1 in `messages` must have `role` and `content`"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "`role` and `content` must be text"),
        ({"prompt": "p", "completion": [ANSWER]}, "`prompt` is text, so `completion` must be too, got list"),
        ({"prompt": "", "completion": "c"}, "`prompt` is empty"),
        ({"prompt": [USER], "completion": []}, "`completion` must be a list of messages"),
        ({"text": 3}, "`text` must be text, got int"),
        ({"instruction": "i", "output": "o"}, "columns found: `instruction`, `output`; accepted are `messages`"),
        ({}, "columns found: none"),
        ({"text": "a", "choices": ["a", "b"]}, "`choices` need a prompt"),
        ({"prompt": "p", "completion": "c", "choices": ["a"]}, "'c' is none of its `choices`"),
        ({"prompt": "p", "completion": "c", "choices": ["c"], "label": 1}, "`label` must be between 0 and 0, got 1"),
        ({"prompt": "p", "completion": "c", "choices": ["a", "c"], "label": 0}, "`label` 0 means 'a'"),
        ({"prompt": "p", "completion": "c", "choices": "ac"}, "`choices` must be a list of texts"),
    ],
)
def test_an_unusable_row_is_reported_with_its_line(values, message):
    with pytest.raises(DataError, match=f"^f:7: .*{message}"):
        examples_of(Row(values, "f:7"), "t")


# Tasks


@pytest.mark.parametrize(
    ("file", "rows", "spec", "names"),
    [
        ("news.jsonl", texts(2), {}, ["news"]),
        ("news.train.jsonl", texts(2), {}, ["news"]),
        ("v1.2.jsonl", texts(2), {}, ["v1.2"]),
        ("news.jsonl", texts(2), {"task": "mine"}, ["mine"]),
        ("news.jsonl", texts(2, task="a"), {}, ["a"]),
        ("news.jsonl", texts(2, task="b") + texts(1, task="a"), {}, ["b", "a"]),
        ("news.jsonl", texts(2, task="b") + texts(1, task="a"), {"task": "a"}, ["a"]),
    ],
)
def test_tasks_are_named_by_column_then_entry_then_file(write, file, rows, spec, names):
    assert [task.name for task in load_tasks([Spec(write(file, rows), **spec)], 0)] == names


def test_an_unknown_task_lists_those_in_the_file(write):
    path = write("a.jsonl", texts(1, task="sentiment") + texts(1, task="sql"))
    with pytest.raises(DataError, match=r"tasks are 'sentiment', 'sql'\. Did you mean 'sentiment'"):
        load_tasks([Spec(path, task="sentimant")], 0)


def test_a_row_without_task_among_others_is_reported_with_its_line(write):
    path = write("a.jsonl", texts(1, task="a") + texts(1))
    with pytest.raises(DataError, match=r"a\.jsonl:2: no `task`"):
        load_tasks([Spec(path)], 0)


def test_entries_of_one_task_are_joined_with_their_mean_weight(write):
    one, two = write("one.jsonl", texts(3)), write("two.jsonl", texts(1))
    [task] = load_tasks([Spec(one, task="t", weight=1.0), Spec(two, task="t", weight=3.0)], 0)
    assert (len(task.train), task.weight) == (4, 1.5)


def test_max_samples_keeps_a_seeded_subset_in_file_order(write):
    path = write("a.jsonl", texts(50))

    def kept(limit, seed):
        return [example.completion for example in load_tasks([Spec(path, max_samples=limit)], seed)[0].train]

    everything = kept(None, 0)
    assert kept(10, 0) == kept(10, 0) != kept(10, 1)
    assert kept(10, 0) == sorted(kept(10, 0), key=everything.index)
    assert set(kept(10, 0)) < set(kept(20, 0))
    assert kept(99, 0) == everything


def test_without_evaluation_data_there_is_no_silent_split(write):
    [task] = load_tasks([Spec(write("a.jsonl", texts(5)))], 0)
    assert (len(task.train), task.eval) == (5, [])


def test_evaluation_rows_go_to_the_trained_tasks(write):
    train = write("train.jsonl", texts(3, task="a") + texts(3, task="b"))
    scored = write("all.jsonl", texts(9, task="b") + texts(9, task="c"))
    first, second = load_tasks([Spec(train, eval_path=scored, eval_max_samples=4)], 0)
    assert (first.eval, len(second.eval), {example.task for example in second.eval}) == ([], 4, {"b"})


@pytest.mark.parametrize(
    ("train", "scored", "message"),
    [
        (texts(1), texts(1, task="b"), "no row of task 'train'; its tasks are 'b'"),
        (
            texts(1, task="a") + texts(1, task="b"),
            texts(1),
            "rows need a `task` column, because the entry trains a, b",
        ),
    ],
)
def test_evaluation_rows_of_no_trained_task_are_an_error(write, train, scored, message):
    spec = Spec(write("train.jsonl", train), eval_path=write("eval.jsonl", scored))
    with pytest.raises(DataError, match=message):
        load_tasks([spec], 0)


def test_a_split_of_a_single_file_never_scores_the_training_rows(write):
    with pytest.raises(DataError, match="name another file in `eval_path`"):
        load_tasks([Spec(write("a.jsonl", texts(2)), eval_split="test")], 0)


# Tokens


def test_a_chat_completion_is_what_the_model_must_generate():
    tokenizer = tiny_tokenizer()
    prompt, completion = encode_parts(Example([USER], "yo", "t"), tokenizer)
    assert prompt == tokenizer.apply_chat_template([USER], add_generation_prompt=True)["input_ids"]
    # The template writes a newline after the end-of-turn token; generation stops before it.
    assert tokenizer.decode(completion) == "yo<|im_end|>"


@pytest.mark.parametrize(
    ("example", "prompt", "completion"),
    [
        (Example([USER], "yo", "t"), "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>"),
        (Example("Q: ", "yo", "t"), "Q: ", "yo<|im_end|>"),
        (Example(None, "a story", "t"), "", "a story<|im_end|>"),
    ],
)
def test_the_preview_shows_what_the_model_sees(example, prompt, completion):
    assert format_preview(example, tiny_tokenizer()) == (prompt, completion)


@pytest.mark.parametrize(
    ("max_length", "prompt", "completion"),
    [(None, "abcdef", "xy<|im_end|>"), (9, "abcdef", "xy<|im_end|>"), (5, "ef", "xy<|im_end|>"), (2, "", "xy")],
)
def test_truncation_gives_up_the_start_of_the_prompt_first(max_length, prompt, completion):
    assert format_preview(Example("abcdef", "xy", "t"), tiny_tokenizer(), max_length) == (prompt, completion)


def test_only_the_completion_has_labels():
    row = encode(Example("ab", "c", "t"), tiny_tokenizer(), None)
    assert row["labels"] == [-100, -100, VOCABULARY["c"], END_ID]
    assert supervised_tokens(row["labels"]) == 2
    assert supervised_tokens(encode(Example(None, "abc", "t"), tiny_tokenizer(), None)["labels"]) == 3


def test_a_token_across_the_boundary_is_split_as_generation_would():
    core = Tokenizer(WordLevel({UNK: 0, "a": 1, "b": 2, "ab": 3, END: 4}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("ab|[\\s\\S]"), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, unk_token=UNK)
    assert tokenizer("ab").input_ids == [3]
    assert encode_parts(Example("a", "b", "t"), tokenizer) == ([1], [2, 4])


def test_a_begin_of_text_token_the_tokenizer_adds_leads_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    assert encode_parts(Example("a", "b", "t"), tokenizer)[0] == [VOCABULARY["a"]]
    start = ("<|im_start|>", VOCABULARY["<|im_start|>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    assert encode_parts(Example("a", "b", "t"), tokenizer)[0] == [start[1], VOCABULARY["a"]]
    assert encode_parts(Example(None, "b", "t"), tokenizer)[0] == [start[1]]


def test_a_template_without_end_token_still_teaches_to_stop():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert encode_parts(Example([USER], "yo", "t"), tokenizer)[1][-1] == END_ID


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        (CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>"), "renders the prompt differently"),
    ],
)
def test_a_template_that_cannot_serve_is_an_error(template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"task 't'.*{message}"):
        encode(Example([USER], "yo", "t"), tokenizer, None)


def test_tokenized_tasks_count_what_is_learned_cut_and_left_out():
    examples = [Example("ab", "cd", "t"), Example("a" * 20, "cd", "t"), Example(None, "", "t")]
    tasks = [TaskData("empty", 1.0, [], []), TaskData("t", 1.0, examples, examples[:1])]
    [train] = tokenize_tasks(tasks, tiny_tokenizer(), 8)
    assert (train.name, train.supervised_tokens, train.truncated, train.dropped) == ("t", 6, 1, 1)
    assert train.dataset.column_names == ["input_ids", "labels", "task_ids"]
    assert list(train.dataset["task_ids"]) == [1, 1]
    [scored] = tokenize_tasks(tasks, tiny_tokenizer(), 8, split="eval")
    assert len(scored.dataset) == 1


def test_nothing_to_learn_is_an_error_naming_task_and_reason():
    tasks = [TaskData("silent", 1.0, [Example(None, "", "silent")], [])]
    with pytest.raises(DataError, match="task 'silent': none of its 1 rows has a token to learn"):
        tokenize_tasks(tasks, tiny_tokenizer(), 64)


# Mixture


def numbered(*sizes):
    return [
        datasets.Dataset.from_dict({"task_ids": [task] * size, "row": list(range(size))})
        for task, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("weight", "times"),
    [
        (1.0, {1: 10}),
        (2.0, {2: 10}),
        (0.5, {1: 5}),
        (0.25, {1: 3}),
        (0.24, {1: 2}),
        (2.3, {3: 3, 2: 7}),
        (0.001, {1: 1}),
    ],
)
def test_a_weight_is_the_number_of_passes_over_the_rows(weight, times):
    mixed = mix(numbered(10), [weight], seed=0)
    assert Counter(Counter(mixed["row"]).values()) == times


def test_a_mixture_is_seeded_shuffled_and_each_choice_independent():
    first, again, other = (mix(numbered(20, 30), [1.0, 0.5], seed).to_list() for seed in (0, 0, 1))
    assert first == again != other
    assert [row["task_ids"] for row in first] != sorted(row["task_ids"] for row in first)
    kept = {row["row"] for row in first if row["task_ids"] == 1}
    assert kept == {row["row"] for row in mix(numbered(5, 30), [2.0, 0.5], 0) if row["task_ids"] == 1}


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_weight_is_an_error(weight):
    with pytest.raises(DataError, match="must be a number above 0"):
        mix(numbered(3), [weight], 0)


# Batches


@pytest.mark.parametrize(
    ("side", "multiple", "ids", "labels"),
    [
        ("right", None, [[5, 3], [7, 9]], [[-100, 3], [7, -100]]),
        ("left", None, [[5, 3], [9, 7]], [[-100, 3], [-100, 7]]),
        ("right", 4, [[5, 3, 9, 9], [7, 9, 9, 9]], [[-100, 3, -100, -100], [7, -100, -100, -100]]),
    ],
)
def test_rows_are_padded_at_the_asked_side(side, multiple, ids, labels):
    rows = [{"input_ids": [5, 3], "labels": [-100, 3]}, {"input_ids": [7], "labels": [7]}]
    batch = TaskCollator(9, side, multiple)(rows)
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == (ids, labels)
    assert torch.equal(batch["attention_mask"] == 1, batch["input_ids"] != 9)


def test_padding_with_the_end_token_keeps_real_ends_supervised():
    rows = [encode(Example("a", text, "t"), tiny_tokenizer(), None) for text in ("b", "bcd")]
    batch = TaskCollator(END_ID)(rows)
    assert (batch["labels"] == END_ID).sum(dim=1).tolist() == [1, 1]


def test_task_ids_travel_with_the_batch_when_every_row_has_one():
    row = {"input_ids": [1], "labels": [1]}
    assert torch.equal(TaskCollator(0)([row | {"task_ids": 4}] * 2)["task_ids"], torch.tensor([4, 4]))
    assert "task_ids" not in TaskCollator(0)([row | {"task_ids": 4}, row])


SCORED = {"messages": [USER, ANSWER, USER, ANSWER], "expert_scores": [1, -0.5]}


def test_expert_scores_travel_from_the_row_to_the_batch(write):
    [task] = load_tasks([Spec(write("a.jsonl", [SCORED, SCORED | {"expert_scores": [0.25, 2]}]))], 0)
    assert [example.expert_scores for example in task.train] == [(1.0, -0.5)] * 2 + [(0.25, 2.0)] * 2
    [tokenized] = tokenize_tasks([task], tiny_tokenizer(), None)
    batch = TaskCollator(0)(list(tokenized.dataset))
    wanted = torch.tensor([[1, -0.5], [1, -0.5], [0.25, 2], [0.25, 2]])
    assert torch.equal(batch["expert_scores"], wanted)
    assert (
        "expert_scores"
        not in tokenize_tasks([TaskData("t", 1, [Example("a", "b", "t")], [])], tiny_tokenizer(), 9)[
            0
        ].dataset.column_names
    )


@pytest.mark.parametrize(
    ("other", "fragment"),
    [
        ({"messages": [USER, ANSWER]}, "b.jsonl:1: no `expert_scores`, though "),
        (SCORED | {"expert_scores": [1.0, 2.0, 3.0]}, "b.jsonl:1: 3 `expert_scores`, though "),
        (SCORED | {"expert_scores": "1 2"}, "b.jsonl:1: `expert_scores` must be a list of numbers"),
        (SCORED | {"expert_scores": []}, "b.jsonl:1: `expert_scores` must be a list of numbers"),
        (SCORED | {"expert_scores": [1.0, None]}, "b.jsonl:1: `expert_scores` must be a list of numbers"),
        (SCORED | {"expert_scores": [1.0, float("nan")]}, "b.jsonl:1: `expert_scores` must be a list of numbers"),
    ],
)
@pytest.mark.parametrize("held_out", [True, False])
def test_all_rows_of_a_run_have_as_many_scores_or_none(other, fragment, held_out, write):
    first, second = write("a.jsonl", [SCORED]), write("b.jsonl", [other])
    specs = [Spec(first, eval_path=second, task="t")] if held_out else [Spec(first), Spec(second)]
    with pytest.raises(DataError) as error:
        load_tasks(specs, 0)
    assert fragment in str(error.value)


# Shipped examples


@pytest.mark.parametrize("train", sorted(EXAMPLES.glob("*.train.jsonl")), ids=lambda path: path.name)
def test_shipped_data_loads_and_is_attributed(train):
    test = train.with_name(train.name.replace(".train.", ".test."))
    [task] = load_tasks([Spec(str(train), eval_path=str(test))], 0)
    assert train.name == f"{task.name}.train.jsonl"
    assert f"| {task.name} |" in (EXAMPLES / "NOTICE.md").read_text(encoding="utf-8")
    assert (len(task.train) <= 500, 0 < len(task.eval) <= 100) == (True, True)
    assert not {str(example.prompt) for example in task.train} & {str(example.prompt) for example in task.eval}


def test_shipped_data_is_small():
    assert sum(file.stat().st_size for file in EXAMPLES.iterdir()) < 1_000_000
