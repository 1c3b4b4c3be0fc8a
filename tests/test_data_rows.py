"""Datasets of a run file: read, recognised and named as documented, the shipped ones too."""

from pathlib import Path

import data_files
import datasets
import pytest
from data_files import ANSWER, USER, Spec

from molora.data import Example, Row, examples_of, load_tasks, read_rows
from molora.errors import DataError

write = data_files.write

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"


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
