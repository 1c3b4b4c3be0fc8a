"""Distillation: the teacher stays as it is, students get closer, and what cannot work is refused."""

from __future__ import annotations

import pytest
import tiny
import torch
from distilling import COLLATE, gradients, plain_loss, routed, rows, student, trainer_for
from transformers import Trainer

from molora import MoloraError
from molora.trainers import DistillationMixin, DistillationOptions, MoLoraTrainer, RoutingLossMixin, distil
from molora.trainers.distillation_loss import sum_of_hidden_errors


@pytest.mark.parametrize("shares", [False, True], ids=["own base", "shared base"])
def test_the_teacher_stays_as_it_is(tmp_path, shares):
    teacher = routed(lora_dropout=0.5).train()
    base = tiny.tiny_llama()
    if shares:
        own = dict(base.named_parameters())
        for name, parameter in teacher.get_base_model().named_parameters():
            plain = name.replace(".base_layer", "")
            if plain in own:
                module = base.get_submodule(plain.rpartition(".")[0])
                module.register_parameter(plain.rpartition(".")[2], parameter)
    model = student(base)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wanted = [parameter.requires_grad for parameter in teacher.parameters()]
    trainer = trainer_for(tmp_path, model, teacher, max_steps=2, per_device_train_batch_size=4)
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [parameter.requires_grad for parameter in teacher.parameters()] == wanted
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(module.training for module in teacher.modules())
    theirs = {id(parameter) for name, parameter in teacher.named_parameters() if "molora" in name}
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert not theirs & trained
    assert not any("teacher" in name for name in trainer.model.state_dict())


def divergence(model, teacher, data, **given):
    batch = COLLATE(list(data))
    mask = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    for one in (model, teacher):
        one.eval()
    with torch.no_grad():
        q, p = (
            torch.log_softmax(one(**inputs, **extra).logits[mask], -1)
            for one, extra in ((model, {}), (teacher, given))
        )
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_a_plain_lora_comes_closer_to_a_routed_teacher():
    model, teacher, data = student().eval(), routed().eval(), rows(16)
    before = divergence(model, teacher, data)
    distil(model, teacher, data, COLLATE, steps=40, learning_rate=1e-2, batch_size=16, seed=1)
    after = divergence(model, teacher, data)
    assert after < before / 5
    assert not model.training


def test_hidden_states_come_closer_too():
    data, batch = rows(16), COLLATE(list(rows(16)))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    errors = []
    for weight in (0.0, 5.0):
        model, teacher = student().eval(), routed().eval()
        options = DistillationOptions(hidden_weight=weight)
        distil(model, teacher, data, COLLATE, steps=20, learning_rate=1e-2, batch_size=16, distillation=options)
        with torch.no_grad():
            own, other = (one(**inputs, output_hidden_states=True).hidden_states[1:] for one in (model, teacher))
        real = batch["attention_mask"].bool()
        errors.append(sum_of_hidden_errors([one[real] for one in own], [one[real] for one in other]).item())
    assert errors[1] < errors[0] * 0.8


def test_task_ids_reach_a_teacher_that_routes_by_them(tmp_path):
    teacher = routed("polytropon", num_tasks=2, num_experts=3, lora_alpha=64)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "router" in name:
                parameter.copy_(torch.randn_like(parameter))
    data = rows(4, task_ids=[1])
    expected = [divergence(student(), teacher, data, task_ids=torch.tensor([task] * 4)) for task in (0, 1)]
    trainer = trainer_for(tmp_path, student(), teacher, data, per_device_train_batch_size=4)
    assert gradients(trainer)[1]["loss"] == pytest.approx(expected[1], rel=1e-3)
    assert expected[0] != pytest.approx(expected[1], rel=0.05)


def test_a_routed_student_keeps_its_routing_losses(tmp_path):
    class Both(RoutingLossMixin, DistillationMixin, Trainer):
        pass

    model = routed("adamole", num_experts=4, routing_losses={"load_balancing": 0.1})
    trainer = trainer_for(tmp_path, model, routed(), kind=Both, per_device_train_batch_size=4)
    _, logged = gradients(trainer)
    added = 0.1 * logged["molora/load_balancing"]
    assert logged["loss"] == pytest.approx(logged["distillation/kl"] + added, rel=1e-3)
    assert added > 0.01


def test_evaluation_compares_with_and_without_labels(tmp_path):
    for labels in (True, False):
        data = rows(4, labels=labels)
        trainer = trainer_for(tmp_path, student(), routed(), data, per_device_eval_batch_size=4)
        found = trainer.evaluate(data)["eval_loss"]
        batch = trainer.data_collator(list(data))
        batch.setdefault("labels", torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100))
        assert found > 0
        if labels:
            assert found == pytest.approx(plain_loss(student(), routed(), batch)[0], rel=1e-4)


def test_no_files_are_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    distil(student(), routed(), rows(4), COLLATE, steps=1, learning_rate=1e-3, batch_size=4)
    assert not list(tmp_path.iterdir())


IMPOSSIBLE = {
    "temperature": ({"temperature": 0.0}, "above 0"),
    "weight": ({"hidden_weight": -1.0}, "at least 0"),
    "chunk": ({"chunk_tokens": 0}, "at least 1"),
    "layers": ({"hidden_layers": "first"}, "'all', 'last'"),
}


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(MoloraError, match=message):
        DistillationOptions(**options)


def test_pairs_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(MoloraError, match="100 tokens and the teacher 120"):
        trainer_for(tmp_path, student(), tiny.tiny_llama(vocab_size=120))
    with pytest.raises(MoloraError, match="the teacher must be a decoder-only"):
        trainer_for(tmp_path, student(), tiny.tiny_t5())
    options = DistillationOptions(hidden_weight=1.0)
    deeper = trainer_for(tmp_path, student(), tiny.tiny_llama(num_hidden_layers=3), options=options)
    with pytest.raises(MoloraError, match="2 layers of width 32, the teacher 3 of width 32"):
        deeper.train()
    trainer = trainer_for(tmp_path, options=DistillationOptions(hidden_weight=1.0, hidden_layers=(7,)))
    with pytest.raises(MoloraError, match="layers 0 to 2"):
        trainer.train()


def test_what_would_be_ignored_is_refused(tmp_path):
    class Wrong(DistillationMixin, MoLoraTrainer):
        pass

    with pytest.raises(MoloraError, match="put RoutingLossMixin before"):
        trainer_for(tmp_path, kind=Wrong)
    with pytest.raises(MoloraError, match="label_smoothing_factor"):
        trainer_for(tmp_path, label_smoothing_factor=0.1)
    trainer = trainer_for(tmp_path, train=rows(4, labels=False), options=DistillationOptions(task_weight=1.0))
    with pytest.raises(MoloraError, match="task_weight needs labels"):
        trainer.train()
    frozen = student()
    frozen.requires_grad_(False)
    with pytest.raises(MoloraError, match="nothing of the student is trainable"):
        distil(frozen, routed(), rows(4), COLLATE, steps=1, learning_rate=1e-3, batch_size=4)
