"""lm-evaluation-harness: its numbers are molora's own on the same rows, however an adapter routes, and all offline."""

from __future__ import annotations

import json
import math
import sys

import pytest
import scoring
import tiny
import torch
import yaml
from reports import write_base
from scoring import adapted, tasks_of, write_rows

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import molora.harness.tasks
from molora import MoloraError
from molora.commands import evaluate as command
from molora.data import encode_parts
from molora.evaluation import score_tasks
from molora.harness import evaluate
from molora.harness.lm import RoutedLM


def user(text):
    return {"role": "user", "content": text}


def rows(scores: bool = False) -> list[dict]:
    """The shared rows with prompts of unequal length; every second choice and all free answers are asked in chats."""
    made = scoring.rows()
    for index, row in enumerate(made):
        if row["task"] == "pick":
            row["prompt"] += "abc" * (index % 4)
        if row["task"] == "say" or index % 2:
            row["prompt"] = [user(row["prompt"])]
        if scores:
            row["expert_scores"] = [float(index % 3), 1.0, float(index % 2)]
    return made


ROUTINGS = {
    "token": {"top_k": 2, "selection": "top_k"},
    "token, from data": {"top_k": 2, "selection": "top_k", "router_norm": "standardize", "router_init": "clusters"},
    "sequence": {"router_level": "sequence", "selection": "dense"},
    "sequence of the base": {"router_level": "sequence", "router_input": "base", "selection": "dense"},
    "task": {"router": "task", "num_tasks": 2, "selection": "dense"},
    "scores": {"router": "external", "selection": "dense"},
}


@pytest.mark.parametrize("fields", [None, *ROUTINGS.values()], ids=["base", *ROUTINGS])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_choices_and_answers_score_as_in_training(tmp_path, fields, batch_size):
    model = tiny.tiny_llama() if fields is None else adapted(**fields)
    data = tasks_of(write_rows(tmp_path, rows(scores=fields == ROUTINGS["scores"])))
    tokenizer = tiny.tiny_tokenizer()
    ids = {"pick": 0, "say": 1} if fields == ROUTINGS["task"] else None
    found = evaluate(model, tokenizer, data=data, batch_size=batch_size, max_new_tokens=6, task_ids=ids)
    own = score_tasks(model, tokenizer, data, max_new_tokens=6, progress=False)
    names = {"accuracy": "acc", "accuracy_norm": "acc_norm", "exact_match": "exact_match", "token_f1": "token_f1"}
    for score in own:
        if score.metric == "perplexity":  # the harness has it for texts only
            continue
        assert found.value(score.task, names[score.metric]) == pytest.approx(score.value)


def test_a_router_of_the_base_per_token_is_evaluated_without_a_cache(tmp_path):
    model, tokenizer = adapted(router_level="token", router_input="base", selection="dense"), tiny.tiny_tokenizer()
    data = tasks_of(write_rows(tmp_path, rows()))
    found = evaluate(model, tokenizer, data=data, batch_size=2, max_new_tokens=6)
    assert "generate" not in vars(model)
    answers = [task for task in data if task.name == "say"]
    own = {s.metric: s.value for s in score_tasks(model, tokenizer, answers, max_new_tokens=6, progress=False)}
    assert found.value("say", "token_f1") == pytest.approx(own["token_f1"])
    assert found.value("pick", "acc") >= 0


def likelihoods(lm, examples, tokenizer):
    """Of every choice of every example, asked for as the harness does, and by running one row without padding."""
    requests, wanted = [], []
    for index, example in enumerate(examples):
        prompt = str(tokenizer.decode(encode_parts(example, tokenizer)[0])).rstrip()
        for place, choice in enumerate(example.choices):
            requests.append(Instance("loglikelihood", {}, (prompt, choice), place, metadata=("t", index, 1)))
            ids = tokenizer(prompt)["input_ids"], tokenizer(choice)["input_ids"]
            wanted.append(ids)
    return [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)], wanted


@pytest.mark.parametrize("name", ["token", "sequence", "sequence of the base"])
def test_likelihoods_depend_on_neither_padding_nor_batch(tmp_path, name):
    model, tokenizer = adapted(**ROUTINGS[name]), tiny.tiny_tokenizer()
    examples = [example for example in tasks_of(write_rows(tmp_path, rows()))[0].eval if example.choices]
    one, pairs = likelihoods(RoutedLM(model, tokenizer, batch_size=1), examples, tokenizer)
    many, _ = likelihoods(RoutedLM(model, tokenizer, batch_size=7), examples, tokenizer)
    assert many == pytest.approx(one, rel=1e-4)
    for value, (prompt, choice) in zip(many, pairs, strict=True):
        mask = torch.tensor([[True] * len(prompt) + [False] * len(choice)])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + choice]), prompt_mask=mask).logits[0]
        steps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
        assert value == pytest.approx(steps.gather(1, torch.tensor(choice)[:, None]).sum().item(), rel=1e-4)


def test_the_harness_alone_would_route_sequences_by_padding(tmp_path):
    """Why `RoutedLM` exists: without it the same choices score otherwise beside longer ones."""
    model, tokenizer = adapted(**ROUTINGS["sequence"]), tiny.tiny_tokenizer()
    examples = [example for example in tasks_of(write_rows(tmp_path, rows()))[0].eval if example.choices]
    values = [
        likelihoods(HFLM(model, tokenizer=tokenizer, backend="causal", batch_size=size), examples, tokenizer)[0]
        for size in (1, 7)
    ]
    assert values[0] != pytest.approx(values[1], rel=1e-4)


def test_text_becomes_perplexities_of_words_and_bytes(tmp_path):
    model, tokenizer = adapted(), tiny.tiny_tokenizer()
    texts = ["ab cd", "hello there you"]
    data = tasks_of(write_rows(tmp_path, [{"text": text} for text in texts], "prose.jsonl"))
    found = evaluate(model, tokenizer, data=data, batch_size=2)
    total = 0.0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0, :-1]
        total += torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum().item()
    words, characters = sum(len(text.split()) for text in texts), sum(map(len, texts))
    assert found.value("prose", "word_perplexity") == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert found.value("prose", "byte_perplexity") == pytest.approx(math.exp(-total / characters), rel=1e-4)
    assert found.value("prose", "bits_per_byte") == pytest.approx(-total / characters / math.log(2), rel=1e-4)


def test_prompts_that_look_alike_keep_their_own_tokens(tmp_path):
    """Characters that the tokenizer does not know all look the same when decoded."""
    model, tokenizer = adapted(), tiny.tiny_tokenizer()
    given = [{"task": "say", "prompt": prompt, "completion": "ab"} for prompt in ("a<unk>", "aé", "aß")]
    data = tasks_of(write_rows(tmp_path, given))
    found = evaluate(model, tokenizer, data=data, batch_size=3, max_new_tokens=5)
    own = {s.metric: s.value for s in score_tasks(model, tokenizer, data, max_new_tokens=5, progress=False)}
    assert found.value("say", "token_f1") == pytest.approx(own["token_f1"])


def test_kinds_of_one_task_get_names_and_a_limit_holds_for_each(tmp_path):
    given = [{**row, "task": "all"} for row in rows()] + [{"task": "all", "text": "some words"}]
    found = evaluate(tiny.tiny_llama(), tiny.tiny_tokenizer(), data=tasks_of(write_rows(tmp_path, given)), limit=2)
    counts = {score.task: score.count for score in found.scores}
    assert counts == {"all/choices": 2, "all/answers": 2, "all/texts": 1}


def test_the_model_is_left_in_its_mode(tmp_path):
    model = adapted().train()
    evaluate(model, tiny.tiny_tokenizer(), data=tasks_of(write_rows(tmp_path, rows())), limit=1)
    assert all(module.training for module in model.modules() if module is not model.base_model)


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """Two tasks whose data are local, and one whose data are not."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"question": f"q{i}?", "options": ["yes", "no", "so"], "answer": i % 3} for i in range(6)]
    data = write_rows(folder, documents, "data.jsonl")
    local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    choice = {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
    }
    answer = {
        "task": "local_answer",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    far = {**choice, "task": "far", "dataset_path": "some-owner/some-data", "test_split": "test"}
    for task in ({**choice, **local}, {**answer, **local}, far):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.mark.parametrize("names", [["local_choice", "local_answer"], ["local_*"]], ids=["names", "wildcard"])
def test_task_files_with_local_data_run_offline(task_files, names, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    found = evaluate(adapted(), tiny.tiny_tokenizer(), names, include_path=task_files)
    assert {(s.task, s.metric, s.count) for s in found.scores} >= {
        ("local_choice", "acc", 6),
        ("local_answer", "exact_match", 6),
    }
    assert found.versions["lm_eval"]


@pytest.fixture
def few_tasks(monkeypatch):
    """Leaves out the thousands of tasks that the harness brings, which take seconds to list."""
    manager = molora.harness.tasks.TaskManager
    monkeypatch.setattr(
        molora.harness.tasks, "TaskManager", lambda **given: manager(**{**given, "include_defaults": False})
    )


def test_unknown_tasks_are_answered_with_the_closest(few_tasks, task_files):
    with pytest.raises(MoloraError, match=r"knows no task 'locl_choice'\. Did you mean 'local_choice'\?"):
        evaluate(tiny.tiny_llama(), tiny.tiny_tokenizer(), ["locl_choice"], include_path=task_files)


def test_tasks_that_need_the_hub_say_so_offline(task_files):
    with pytest.raises(MoloraError, match="'far' reads its data from the hub, and HF_HUB_OFFLINE is set"):
        evaluate(tiny.tiny_llama(), tiny.tiny_tokenizer(), ["far"], include_path=task_files)


REFUSED = {
    "no include path": ({"tasks": ["x"], "include_path": "/nowhere"}, "there is no folder '/nowhere'"),
    "nothing": ({}, "nothing to evaluate"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_requests_that_cannot_be_met_are_refused(given, message):
    with pytest.raises(MoloraError, match=message):
        evaluate(tiny.tiny_llama(), tiny.tiny_tokenizer(), **given)


UNROUTED = {
    "task": ("task", {}, "nothing says it for pick, say"),
    "task out of range": ("task", {"task_ids": 2}, "there is no task 2; the adapter knows 0 to 1"),
    "scores": ("scores", {}, "rows of pick, say have none"),
}


@pytest.mark.parametrize(("name", "given", "message"), UNROUTED.values(), ids=UNROUTED)
def test_what_routing_reads_must_be_given(tmp_path, name, given, message):
    data = tasks_of(write_rows(tmp_path, rows()))
    with pytest.raises(MoloraError, match=message):
        evaluate(adapted(**ROUTINGS[name]), tiny.tiny_tokenizer(), data=data, **given)


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MoloraError, match=r'pip install "molora\[eval\]"'):
        evaluate(tiny.tiny_llama(), tiny.tiny_tokenizer(), ["x"])


def test_the_command_adds_tasks_of_the_harness_to_rows(task_files, tmp_path):
    base = write_base(tmp_path / "base")
    file, output = write_rows(tmp_path, rows()), tmp_path / "scores.json"
    options = {"include_path": str(task_files), "data": [str(file)], "limit": 2, "output": str(output)}
    assert command.run(str(base), tasks=["local_choice"], **options) == 0
    document = json.loads(output.read_text())
    assert {score["task"] for score in document["scores"]} == {"pick", "say"}
    assert {score["task"] for score in document["harness"]["scores"]} == {"local_choice"}
    assert document["versions"].keys() >= {"molora", "lm_eval", "torch"}
