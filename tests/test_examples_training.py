"""The examples that train do what they say: short on a tiny model, and as a user starts them on the packaged one."""

from __future__ import annotations

import contextlib
import io
import math
import re
import runpy
import sys

import pytest
import tiny
import torch
from example_runs import EXAMPLES, STEPS, needs_packaged_model, options, start
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from reports import write_base

from molora.bank import MoLoraLayer
from molora.writing import WriteError

ROWS = {"sft": 8, "dpo": 8, "grpo": 32, "classification": 8}  # stories for GRPO are short
NAMES = tuple(ROWS)
# transformers renames what TRL and PEFT still set by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny language model and its tokenizer."""
    return str(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Runs an example once; gives what it defined, what it printed, and where its adapter is."""
    done = {}

    def run(name):
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / name
            done[name] = (*_run(name, options(base, out, ROWS[name])), out)
        return done[name]

    return run


def _run(name, words):
    """Run an example in this process, as the command line would."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [f"{name}.py", *words])
        defined = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return defined, printed.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_and_its_adapter_loads_again(name, runs):
    defined, _, out = runs(name)
    trainer = defined["trainer"]
    logged = [value for entry in trainer.state.log_history for key, value in entry.items() if "loss" in key]
    assert trainer.state.global_step == STEPS  # apart from the supervised ones that the example of GRPO begins with
    assert logged
    assert all(math.isfinite(value) for value in logged)
    head = {"num_labels": 20} if name == "classification" else {}
    kind = AutoPeftModelForSequenceClassification if head else AutoPeftModelForCausalLM
    reloaded = dict(kind.from_pretrained(out, dtype=torch.float32, **head).named_parameters())
    trained = {key: value for key, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained
    assert all(torch.equal(reloaded[key], value) for key, value in trained.items())


@pytest.mark.parametrize("name", NAMES)
def test_an_examples_experts_learn_and_its_routers_start_from_data(name, runs):
    model = runs(name)[0]["trainer"].model
    layers = [module for module in model.modules() if isinstance(module, MoLoraLayer)]
    assert len(layers) == 14  # seven linears in each of two layers, and no head
    for layer in layers:
        router = layer.molora_router["default"]
        assert not router.awaits_data
        assert router.input_std.unique().numel() > 1
    up = [value for key, value in model.named_parameters() if "molora_B" in key]
    assert len(up) == 14
    assert all(value.any() for value in up)


PRINTED = {
    "sft": [r"sentiment .*accuracy", r"arithmetic .*accuracy", r"slot_ext.*token_f1", "max load"],
    "dpo": [r"gained more: [01]\.\d{3}", r"right minus wrong: -?\d+\.\d{3}"],
    "grpo": [r"16 held-out stories, with other verbs: [01]\.\d{3} before GRPO, [01]\.\d{3} after"],
    "classification": [r"2 held-out rows, 20 intents: [01]\.\d{3} before, [01]\.\d{3} after", "the same: True"],
}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_prints_what_it_showed(name, runs):
    printed = runs(name)[1]
    assert not [pattern for pattern in PRINTED[name] if not re.search(pattern, printed)], printed


def test_sft_learns_answers_only_and_mixes_its_tasks(runs):
    trainer, tasks = (runs("sft")[0][name] for name in ("trainer", "tasks"))
    decode = trainer.processing_class.decode
    learned = [decode([i for i in row["labels"] if i != -100]) for row in trainer.train_dataset]
    assert [text.strip() for text in learned] == [f"{e.completion}{tiny.END}" for task in tasks for e in task.train]
    batches = iter(trainer.get_train_dataloader())
    kinds = [set(map(_kind, trainer.processing_class.batch_decode(next(batches)["input_ids"]))) for _ in range(2)]
    assert all(len(kind) > 1 for kind in kinds)


def _kind(text):
    return re.search("Sentence:|Problem:|Command:", text)[0]


def test_dpo_prefers_the_reference_to_a_wrong_choice_of_the_same_row(runs):
    defined = runs("dpo")[0]
    for name in defined["TASKS"]:
        rows = {row.where: row.values for row in defined["read_rows"](str(defined["DATA"] / f"{name}.train.jsonl"))}
        made = defined["pairs"](name, "train", 40)
        assert len(made) == 40
        for pair, shown in zip(made, defined["preferences"](made), strict=True):
            row = rows[pair.where]
            right, wrong = shown["chosen"][0]["content"], shown["rejected"][0]["content"]
            assert right == row["choices"][row["label"]] == row["messages"][1]["content"]
            assert wrong in row["choices"]
            assert wrong != right
            assert shown["prompt"] == row["messages"][:1]
    positions = {tuple(rows[p.where]["choices"]).index(p.choices[1]) for p in made}
    assert positions == {0, 1}  # neither answer is always the wrong one


WORTH = {
    "right": (" 17 - 5", 1.0),
    "right, without space around it": ("17 - 5", 1.0),
    "right by other numbers": (" 13 - 1", 1.0),
    "the wrong operator": (" 17 + 5", 0.5),
    "the other way round": (" 5 - 17", 0.2),
    "other numbers": (" 17 - 4", 0.2),
    "nothing": ("", 0.0),
    "the value alone": (" 12", 0.0),
    "another operator": (" 24 / 2", 0.0),
    "three numbers": (" 17 - 4 - 1", 0.0),
    "further words": (" 17 - 5 eggs", 0.0),
    "too many digits": (" 0017 - 5", 0.0),
    "other digits": (" ١٧ - ٥", 0.0),
    "code": (" __import__('os').getpid() - 5", 0.0),
}


@pytest.mark.parametrize("case", WORTH)
def test_the_reward_of_an_answer_is_as_by_hand(case, runs):
    text, worth = WORTH[case]
    reward = runs("grpo")[0]["reward"]
    given = reward([text, " 20 + 3"], numbers=[[17, 5], [20, 3]], answer=[12, 23], prompts=["", ""])
    assert given == pytest.approx([worth, 1.0])


def test_grpos_stories_have_their_answers_and_only_the_form_is_shown(runs):
    defined = runs("grpo")[0]
    signs = {verb: sign for name in ("VERBS", "HELD_OUT") for sign, verbs in defined[name].items() for verb in verbs}
    for row in (*defined["train"], *defined["held_out"]):
        had, verb, more = re.fullmatch(r"Ann had (\d+) eggs and (\w+) (\d+)\. Now:", row["prompt"]).groups()
        assert row["numbers"] == [int(had), int(more)]
        assert row["answer"] == int(had) + (1 if signs[verb] == "+" else -1) * int(more)
    verbs = [{row["prompt"].split()[5] for row in defined[name]} for name in ("train", "held_out")]
    assert not verbs[0] & verbs[1]
    worths = defined["reward"](
        [row["completion"] for row in defined["shown"]],
        *([row[name] for row in defined["train"]] for name in ("numbers", "answer")),
    )
    assert set(worths) == {0.5, 1.0}  # operators are drawn: some are wrong, and the numbers never are
    assert 0.25 < worths.count(1.0) / len(worths) < 0.75


@pytest.mark.parametrize("name", NAMES)
def test_an_example_overwrites_nothing(name, base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WriteError, match="nothing is overwritten"):
        _run(name, options(base, tmp_path, ROWS[name]))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
@needs_packaged_model
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_on_the_packaged_model(name, tmp_path):
    printed = start(name, options("smollm2-135m-instruct", tmp_path / "out", ROWS[name]), tmp_path, timeout=900)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert not [pattern for pattern in PRINTED[name] if not re.search(pattern, printed)], printed
