"""Scores are what their definition says, whatever the batching, the wrapper and the model's own settings."""

import io
import math

import methods
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny import tiny_gpt2, tiny_llama, tiny_qwen2, tiny_t5, tiny_tokenizer
from transformers import MambaConfig, MambaForCausalLM

from molora.data import Example, TaskCollator, TaskData, encode, encode_parts, tokenize_tasks
from molora.errors import MoloraError
from molora.evaluation import TaskScore, score_table, score_tasks, token_f1
from molora.evaluation.rows import encode_row
from molora.heads import generation_needs
from molora.likelihood import Prompted, likelihoods
from molora.report import routing_by_task
from molora.routing.inputs import routing_inputs

MODELS = [tiny_llama, tiny_qwen2, tiny_gpt2]
TOKENIZER = tiny_tokenizer()


def lora_llama(**overrides):
    model = get_peft_model(tiny_llama(**overrides), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def task(*examples):
    return TaskData("t", 1.0, [], list(examples))


def scores(model, *examples, **options):
    return {s.metric: s for s in score_tasks(model, TOKENIZER, [task(*examples)], progress=False, **options)}


def chat(content, completion, **options):
    return Example([{"role": "user", "content": content}], completion, "t", **options)


@torch.no_grad()
def one_at_a_time(model, prompt, completion):
    """Sum the completion's log-probabilities over one unpadded, uncached sequence."""
    log_probs = model(input_ids=torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion))


@torch.no_grad()
def greedy(model, prompt, steps):
    """Return the greedy continuation over one unpadded, uncached sequence, up to the end token."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == TOKENIZER.eos_token_id:
            break
    return TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


def tiny_mamba():
    """A model with a recurrent state in place of a key-value cache."""
    torch.manual_seed(0)
    ids = {"pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**sizes, **ids)).eval()


@pytest.mark.parametrize("build", [*MODELS, lora_llama, tiny_mamba])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_likelihoods_equal_those_of_single_sequences(build, batch_size):
    model = build()
    rows = [
        Prompted([5, 6, 7, 8, 9], [[10, 11, 3], [12, 3]]),
        Prompted([20], [[3]]),
        Prompted([30, 31], [[40, 41, 42, 3], [43, 3], [44]]),
        Prompted([50, 51, 52], [[60, 61]]),
    ]
    seen = []
    with torch.no_grad():
        found = likelihoods(model, TOKENIZER.pad_token_id, rows, batch_size, seen.append)
    for row, values in zip(rows, found, strict=True):
        wanted = [one_at_a_time(model, row.prompt, completion) for completion in row.completions]
        assert [value.total for value in values] == pytest.approx(wanted, abs=1e-4)
    assert sum(seen) == len(rows)


def test_the_likeliest_choice_wins():
    model = tiny_llama()
    choices = ("alpha", "b", "gam")
    totals = []
    for choice in choices:
        totals.append(one_at_a_time(model, *encode_parts(chat("which?", choice), TOKENIZER)))
    best = totals.index(max(totals))
    examples = [chat("which?", choices[i], choices=choices, label=i) for i in (best, (best + 1) % 3)]
    assert scores(model, *examples)["accuracy"] == TaskScore("t", "accuracy", 0.5, 2)


@pytest.mark.parametrize("build", [*MODELS, lora_llama])
def test_answers_are_greedy_whatever_the_batch_and_the_models_sampling_settings(build):
    # Random models with tied embeddings only repeat the last token.
    model = build(tie_word_embeddings=False)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, top_k=3)
    prompts = ["a", "a longer prompt", "Zz?"]
    answers = [greedy(model, encode_parts(chat(p, ""), TOKENIZER)[0], 6) for p in prompts]
    assert any(answer.strip() for answer in answers)
    found = scores(model, *map(chat, prompts, answers), batch_size=2, max_new_tokens=6)
    assert (found["exact_match"].value, found["token_f1"].value) == (1.0, 1.0)
    wrong = scores(model, *(chat(p, "something else") for p in prompts), max_new_tokens=6)
    assert wrong["exact_match"].value == 0.0


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("a b c", "a b c", 1.0),
        ("c b a", "a b c", 1.0),
        ("a b", "a b c d", 2 / 3),
        ("a a a", "a b", 0.4),
        ("x", "a", 0.0),
        ("", "a", 0.0),
        ("a", "", 0.0),
        ("", " ", 1.0),
    ],
)
def test_token_f1_counts_shared_words_as_bags(answer, reference, value):
    assert token_f1(answer, reference) == pytest.approx(value)


def test_perplexity_is_that_of_the_models_own_loss():
    model = tiny_llama()
    ids = torch.tensor([encode(Example(None, "a story", "t"), TOKENIZER, None)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    found = scores(model, Example(None, "a story", "t"), Example(None, "", "t"))
    assert found["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["perplexity"].count == 1


def test_long_prompts_lose_their_start_where_positions_run_out():
    model = tiny_gpt2(n_positions=32)
    found = scores(
        model,
        Example("x" * 100, "ab", "t", ("ab", "c"), 0),
        Example("x" * 100, "ab", "t"),
        Example(None, "x" * 100, "t"),
        max_new_tokens=4,
    )
    assert set(found) == {"accuracy", "accuracy_norm", "exact_match", "token_f1", "perplexity"}


@pytest.mark.parametrize("choices", [(), ("x" * 60, "b")], ids=["an answer", "a choice"])
def test_answers_longer_than_the_context_lose_their_end(choices):
    found = scores(tiny_gpt2(n_positions=32), chat("q", "x" * 60, choices=choices, label=0 if choices else -1))
    assert math.isfinite(found["perplexity"].value)


def test_a_choice_without_any_token_cannot_be_scored():
    bare = tiny_tokenizer()
    bare.eos_token = None
    row = encode_row(Example("hi", "", "t", ("", "no"), 0), bare, 99)
    assert row is None


def test_answers_that_are_no_numbers_are_refused():
    model = tiny_llama()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(MoloraError, match="training diverged"):
        scores(model, chat("q", "a", choices=("a", "b"), label=0))


def test_a_tokenizer_without_padding_is_told_what_to_set():
    bare = tiny_tokenizer()
    bare.pad_token = None
    with pytest.raises(MoloraError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        score_tasks(tiny_llama(), bare, [task(chat("q", "a"))], progress=False)


def test_bfloat16_scores_are_finite():
    found = scores(tiny_llama().bfloat16(), chat("q", "a", choices=("a", "b"), label=0), Example(None, "text", "t"))
    assert all(math.isfinite(score.value) for score in found.values())


def test_scoring_leaves_modes_and_gradients_as_they_were():
    model = tiny_llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    scores(model, chat("q", "a"), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_tasks_without_evaluation_rows_have_no_score():
    assert score_tasks(tiny_llama(), TOKENIZER, [task()], progress=False) == []


def test_an_encoder_decoder_is_refused():
    with pytest.raises(MoloraError, match="decoder-only"):
        score_tasks(tiny_t5(), TOKENIZER, [task(chat("q", "a"))], progress=False)


def test_the_table_shows_both_scores_and_the_change():
    before = [TaskScore("a", "accuracy", 0.5, 60), TaskScore("b", "perplexity", 20.0, 9)]
    after = [TaskScore("a", "accuracy", 0.75, 60), TaskScore("b", "perplexity", 12.5, 9), TaskScore("c", "f", 1.0, 2)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(before, after))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["a", "accuracy", "60", "0.500", "0.750", "+0.250"] in lines
    assert ["b", "perplexity", "9", "20.00", "12.50", "-7.500"] in lines
    assert ["c", "f", "2", "-", "1.000", "-"] in lines


ROUTED = {
    "a task": ("moelora", {}),
    "a task and the token": ("becotta", {"target_modules": r".*\.layers\.\d+"}),
    "a task and splits": ("polytropon-mhr", {}),
    "scores": ("mor1e", {}),
    "scores and the token": ("glider", {"top_k": 2}),
    "the sequence": ("smear", {}),
    "the base model": ("x-lora", {}),
    "the base model, by token": ("x-lora", {"router_level": "token"}),
    "nothing": ("static", {}),
}
"""What routing reads, and a preset that does."""


def routed_rows(model):
    """Prompts with unequal numbers of completions, with scores if the model reads them."""
    reads = frozenset().union(*(layer.molora_plan["default"].reads for layer in methods.layers_of(model).values()))
    experts = next(iter(methods.layers_of(model).values())).molora_plan["default"].num_experts
    shapes = [([5, 6, 7, 8, 9], [[10, 11, 3], [12, 3]]), ([20], [[3, 4]]), ([30, 31], [[40, 41, 42], [43, 3], [44]])]
    for prompt, completions in shapes:
        scores = tuple(torch.randn(experts).tolist()) if "scores" in reads else ()
        yield Prompted(prompt, completions, scores), "task" in reads


@torch.no_grad()
def routed_one_at_a_time(model, row, completion, task_id):
    """The completion's log-probability over one uncached sequence whose prompt is marked."""
    ids = torch.tensor([row.prompt + completion])
    given = {"prompt_mask": torch.arange(ids.shape[1])[None] < len(row.prompt)}
    if row.expert_scores:
        given["expert_scores"] = torch.tensor([row.expert_scores])
    if task_id is not None:
        given["task_ids"] = torch.tensor([task_id])
    with routing_inputs(model, **given):
        log_probs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    return sum(log_probs[len(row.prompt) - 1 + i, token].item() for i, token in enumerate(completion))


@pytest.mark.parametrize("reads", ROUTED)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_routed_likelihoods_equal_those_of_single_sequences(reads, batch_size):
    preset, fields = ROUTED[reads]
    model = methods.build(preset, **fields)
    rows = list(routed_rows(model))
    task_id = 2 if rows[0][1] else None
    with torch.no_grad():
        found = likelihoods(model, 0, [row for row, _ in rows], batch_size, lambda _: None, task_id)
    for (row, _), values in zip(rows, found, strict=True):
        wanted = [routed_one_at_a_time(model, row, completion, task_id) for completion in row.completions]
        assert [value.total for value in values] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("reads", ROUTED)
def test_routed_answers_do_not_depend_on_the_batch(reads):
    preset, fields = ROUTED[reads]
    model = methods.build(preset, **fields)
    examples = []
    for text, (row, _) in zip(("a", "a longer one", "Zz?"), routed_rows(model), strict=True):
        ids = torch.tensor([encode_parts(chat(text, ""), TOKENIZER)[0]])
        given = {"expert_scores": torch.tensor([row.expert_scores])} if row.expert_scores else {}
        given |= {"task_ids": torch.tensor([1])} if "task" in reads else {}
        output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **generation_needs(model), **given)
        answer = TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        examples.append(chat(text, answer, expert_scores=row.expert_scores))
    found = score_tasks(model, TOKENIZER, [task(), task(*examples)], max_new_tokens=5, progress=False)
    values = {score.metric: score.value for score in found}
    assert (values.pop("exact_match"), values.pop("token_f1"), set(values)) == (1.0, 1.0, {"perplexity"})


def test_before_training_scoring_needs_no_task():
    model = methods.build("moelora")
    with model.disable_adapter():
        plain = score_tasks(model, TOKENIZER, [task(chat("q", "a", choices=("a", "b"), label=0))], progress=False)
    assert plain[0].count == 1


@pytest.mark.parametrize("reads", ["a task", "scores", "the sequence"])
def test_the_routing_of_each_task_is_that_of_its_rows(reads):
    model = methods.build(ROUTED[reads][0])
    scored = [row.expert_scores for row, _ in routed_rows(model)]
    rows = [chat(f"q{i}", "a longer answer", expert_scores=s) for i, s in enumerate(scored)]
    tasks = [TaskData(name, 1.0, rows, rows) for name in ("one", "two")]
    tokenized = tokenize_tasks(tasks, TOKENIZER, None)
    found = routing_by_task(model, tokenized, TaskCollator(0), batch_size=2)
    assert [entry.task for entry in found] == ["one", "two"]
    # The same rows under two tasks: only a task's own router can tell them apart.
    assert (found[0].metrics == found[1].metrics) == (reads != "a task")
