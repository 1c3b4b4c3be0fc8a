"""Every trainer: losses on and logged, scaled as its own, nothing but trained passes counted, tasks that arrive."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import kinds
import pytest
import torch
from kinds import KINDS, ONLINE, gradients, model_for, trainer_for, training_log

import molora.trainers
from molora import MoloraError
from molora.routing.inputs import scopes
from molora.routing.record import record_routing

ONCE = {"max_steps": 1, "max_grad_norm": 0.0}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture
def record_counts(monkeypatch):
    """How many decisions each micro-batch recorded."""
    counts = []

    @contextmanager
    def counted(*args, **kwargs):
        with record_routing(*args, **kwargs) as records:
            yield records
        counts.append(len(records))

    monkeypatch.setattr("molora.trainers.mixin.record_routing", counted)
    return counts


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_trains_with_its_losses_on_and_logs_them(kind, bf16, tmp_path):
    trainer = trainer_for(kind, tmp_path, bf16=bf16)
    routers = [(name, p) for name, p in trainer.model.named_parameters() if "router.default" in name]
    before = {name: p.detach().clone() for name, p in routers}
    trainer.train()
    logged = training_log(trainer)
    assert 0.99 <= logged["molora/load_balancing"] <= 4
    assert logged["molora/router_z"] > 0
    assert 0 < logged["molora/router_entropy"] <= torch.tensor(4.0).log().item() + 1e-6
    assert logged["molora/mutual_information"] < 0
    after = dict(trainer.model.named_parameters())
    assert before
    assert all(not torch.equal(after[name], value) and after[name].isfinite().all() for name, value in before.items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_linear_is_recorded_once_in_each_micro_batch(kind, checkpointing, tmp_path, record_counts):
    """Neither recomputation, nor generation, nor a reference's pass counts; nor does evaluation."""
    trainer = trainer_for(
        kind, tmp_path, gradient_checkpointing=checkpointing, gradient_accumulation_steps=2, max_steps=1
    )
    calls = []
    kinds.adapted_layers(trainer.model)[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    trainer.train()
    assert record_counts == [len(kinds.adapted_layers(trainer.model))] * 2
    assert len(calls) > 2 or not (checkpointing or kind in ("dpo", "kto", *ONLINE))
    trainer.evaluate()
    assert len(record_counts) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind, tmp_path):
    plain = gradients(trainer_for(kind, tmp_path, **ONCE))
    again = gradients(trainer_for(kind, tmp_path, gradient_checkpointing=True, **ONCE))
    assert_same(plain, again, rtol=1e-4, atol=1e-6)


SPLITS = ((4, 1), (2, 2), (1, 4))


@pytest.mark.parametrize("kind", ["transformers", "sft"])  # transformers sums the task losses of a T5
def test_accumulated_batches_add_up_to_the_gradient_of_one(kind, tmp_path):
    losses = {"load_balancing": 0.3}
    data = KINDS[kind][2](4)

    def split(rows, steps):
        model = model_for(kind, kinds.config(routing_losses=losses))
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **ONCE}
        return gradients(trainer_for(kind, tmp_path, model, data, **settings))

    whole, halves, quarters = (split(*sizes) for sizes in SPLITS)
    assert_same(whole, halves, rtol=1e-4, atol=1e-6)
    assert_same(whole, quarters, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_routing_loss_is_averaged_over_accumulated_batches(kind, tmp_path):
    """Four micro-batches of the same row add what one adds: losses are scaled as the trainer scales its own."""
    data = KINDS[kind][2](1) * 8
    rows = 2 if kind in ("kto", *ONLINE) else 1

    def added(steps):
        settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **ONCE}
        losses = {"load_balancing": {"coefficient": 3.0, "scope": "batch"}, "router_z": 1.0}
        on, off = (
            gradients(
                trainer_for(kind, tmp_path, model_for(kind, kinds.config(routing_losses=given)), data, **settings)
            )
            for given in (losses, {})
        )
        return {name: on[name] - off[name] for name in on if "router" in name}

    once, often = added(1), added(4)
    assert all(gradient.abs().max() > 1e-5 for gradient in once.values())
    assert_same(once, often, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_evaluation_loss_is_the_trainers_own(kind, tmp_path):
    losses = []
    for coefficient in (0.0, 100.0):
        model = model_for(kind, kinds.config(routing_losses={"load_balancing": coefficient, "router_z": coefficient}))
        losses.append(trainer_for(kind, tmp_path, model).evaluate()["eval_loss"])
    assert losses[0] == losses[1]


class Watch:
    """The passes of a model: their first tokens, and the tasks that routers would be told."""

    def __init__(self, model):
        self.passes = []
        [self.scope] = scopes(model)
        self.hook = model.get_base_model().register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        ids = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:  # later steps of a generation hold no prompt
            first = (ids != 0).int().argmax(dim=1)
            letters = ids.gather(1, first.unsqueeze(1)).squeeze(1)
            given = self.scope.inputs.task_ids if self.scope.inputs is not None else None
            self.passes.append((letters.tolist(), None if given is None else given.tolist(), torch.is_grad_enabled()))

    def check(self):
        letters = {token: task for task, letter in enumerate(kinds.TASKS) for token in kinds.encoded(letter)}
        assert self.passes
        for first, tasks, _ in self.passes:
            assert tasks == [letters[token] for token in first]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seq2seq"])
def test_every_pass_is_told_the_tasks_of_its_rows(kind, tmp_path):
    """Also generation, the reference's passes and, where there is one, the pass of other answers."""
    trainer = trainer_for(kind, tmp_path, model_for(kind, kinds.by_task()), max_steps=1)
    watch = Watch(trainer.model)
    trainer.train()
    assert any(grad for *_, grad in watch.passes)
    trained = len(watch.passes)
    trainer.evaluate()
    assert len(watch.passes) > trained
    watch.check()


ORDERS = {
    "scored in chunks": {"steps_per_generation": 2},
    "scored in chunks beside a reference": {"steps_per_generation": 2, "beta": 0.1},
    "used again": {"num_iterations": 2},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ONLINE)
def test_answers_keep_the_task_of_their_prompt_however_they_are_batched(kind, order, tmp_path):
    settings = {"max_steps": 4, "generation_kwargs": {"do_sample": True}, **ORDERS[order]}
    trainer = trainer_for(kind, tmp_path, model_for(kind, kinds.by_task()), **settings)
    watch = Watch(trainer.model)
    trainer.train()
    assert sum(grad for *_, grad in watch.passes) == 4
    assert any(not grad for *_, grad in watch.passes)
    watch.check()


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", *ONLINE])
def test_decisions_about_prompts_are_made_in_every_trainer(kind, tmp_path):
    """The prompt is found in each pass, by the labels that the model is told."""
    trainer = trainer_for(kind, tmp_path, model_for(kind, kinds.config("smear")))
    trainer.train()
    trainer.evaluate()
    assert all("loss" in entry or "eval_loss" in entry or "train_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("reference", ["disabled adapter", "copy of the adapter"])
def test_a_reference_is_neither_counted_nor_trained(reference, tmp_path, record_counts):
    adapter = kinds.config(routing_losses={"load_balancing": 0.1}, task_type="CAUSAL_LM")
    copied = reference == "copy of the adapter"
    given = model_for("dpo", adapter) if copied else kinds.base_of("dpo")
    trainer = kinds.KINDS["dpo"][0](
        given,
        args=kinds.KINDS["dpo"][1](output_dir=str(tmp_path), **kinds.COMMON),
        train_dataset=kinds.Dataset.from_list(kinds.pairs()),
        processing_class=kinds.tiny.tiny_tokenizer(),
        peft_config=None if copied else adapter,
    )
    assert ("ref" in trainer.model.peft_config) == copied
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    assert record_counts == [len(kinds.adapted_layers(trainer.model))] * 2
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


PER_TOKEN = {
    "scores of tokens": ({"expert_scores": [[1.0, 2.0, 3.0, 4.0]]}, "Give one value per row"),
    "a prompt": ({"prompt_mask": [1, 1]}, "prompts are known here"),
}


@pytest.mark.parametrize("case", PER_TOKEN)
def test_values_for_tokens_that_are_yet_to_be_made_are_refused(case, tmp_path):
    columns, message = PER_TOKEN[case]
    trainer = trainer_for("grpo", tmp_path, train=[{**row, **columns} for row in kinds.prompts()])
    with pytest.raises(MoloraError, match=message):
        trainer.train()


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("engine", ["use_vllm", "use_transformers_continuous_batching"])
def test_engines_that_cannot_route_are_refused(kind, engine, tmp_path, monkeypatch):
    trainer = trainer_for(kind, tmp_path, model_for(kind, kinds.by_task()))
    monkeypatch.setattr(trainer, engine, True)
    with pytest.raises(MoloraError, match=f"{engine}=True"):
        trainer._refuse_other_engines()
    monkeypatch.setattr(trainer, "model", model_for(kind, kinds.config("static")))
    trainer._refuse_other_engines()


def test_a_trainer_is_imported_when_it_is_asked_for():
    code = (
        "import sys; from molora.trainers import MoLoraTrainer; print([m for m in sys.modules if 'trl.trainer' in m])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_all_trainers_are_listed_and_found():
    names = [name for name in molora.trainers.__all__ if name.startswith("MoLora")]
    assert {getattr(molora.trainers, name) for name in names} == {row[0] for row in KINDS.values()}
    assert set(molora.trainers.__all__) <= set(dir(molora.trainers))
    with pytest.raises(AttributeError, match="MoLoraPPOTrainer"):
        molora.trainers.MoLoraPPOTrainer  # noqa: B018


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_reference_that_is_run_beforehand_is_routed_with_the_columns_of_its_rows(kind, tmp_path):
    logged = []
    for beforehand in (False, True):
        trainer = trainer_for(
            kind, tmp_path, model=model_for(kind, kinds.by_task()), precompute_ref_log_probs=beforehand
        )
        trainer.train()
        logged.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)
