"""Rows of a dataset: tokenized, mixed and batched as documented."""

from collections import Counter

import data_files
import datasets
import pytest
import torch
from data_files import ANSWER, USER, Spec
from tiny import CHAT_TEMPLATE, END, UNK, VOCABULARY, tiny_tokenizer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from molora.data import (
    Example,
    TaskCollator,
    TaskData,
    encode,
    encode_parts,
    format_preview,
    load_tasks,
    mix,
    supervised_tokens,
    tokenize_tasks,
)
from molora.errors import DataError

write = data_files.write

END_ID = VOCABULARY[END]


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
