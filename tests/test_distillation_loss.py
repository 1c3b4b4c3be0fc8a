"""Distillation: the loss is the formula, whole or in chunks, whatever makes the logits and however batches are cut."""

from __future__ import annotations

import pytest
import tiny
import torch
from distilling import COLLATE, gradients, plain_loss, routed, rows, student, trainer_for
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    Trainer,
)

from molora.trainers import (
    DistillationMixin,
    DistillationOptions,
    DistillationSFTTrainer,
    DistillationTrainer,
    RoutingLossMixin,
)
from molora.trainers.distillation_loss import Predictions, head_of, makes_logits, sums_of_predictions

FORMULAS = {
    "divergence": {},
    "temperature": {"temperature": 2.5},
    "hidden states": {"hidden_weight": 0.7},
    "last layer": {"hidden_weight": 0.7, "hidden_layers": "last"},
    "one layer": {"hidden_weight": 0.7, "hidden_layers": (1,)},
    "labels too": {"task_weight": 0.3, "temperature": 1.5},
}


@pytest.mark.parametrize("options", FORMULAS.values(), ids=FORMULAS)
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, options):
    model, teacher = student(init_lora_weights=False), routed()
    data = rows(4)
    layers = {"last": (2,), (1,): (1,)}.get(options.get("hidden_layers", "all"), (1, 2))
    expected, wanted = plain_loss(
        model,
        teacher,
        COLLATE(list(data)),
        options.get("temperature", 1.0),
        options.get("hidden_weight", 0.0),
        options.get("task_weight", 0.0),
        layers,
    )
    trainer = trainer_for(
        tmp_path,
        model,
        teacher,
        data,
        options=DistillationOptions(chunk_tokens=3, **options),
        per_device_train_batch_size=4,
    )
    found, logged = gradients(trainer)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient.double(), wanted[name], rtol=1e-3, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )


def test_chunks_add_up_to_the_whole_in_fp64():
    torch.manual_seed(0)
    heads = [nn.Linear(6, 11).double(), nn.Linear(8, 11).double()]
    states = [torch.randn(7, 6, dtype=torch.float64, requires_grad=True), torch.randn(7, 8, dtype=torch.float64)]
    labels = torch.randint(0, 11, (7,))
    results = []
    for chunk in (1, 2, 7, 50):
        sides = [Predictions(state, head) for state, head in zip(states, heads, strict=True)]
        kl, task = sums_of_predictions(*sides, labels, 1.7, chunk)
        results.append((kl, task, *torch.autograd.grad(kl + task, [states[0], *heads[0].parameters()])))
    p, q = (
        torch.log_softmax(head(state) / 1.7, -1) for state, head in zip(reversed(states), reversed(heads), strict=True)
    )
    torch.testing.assert_close(results[0][0], 1.7**2 * (p.exp() * (p - q)).sum())
    for one in results[1:]:
        torch.testing.assert_close(one, results[0])


def test_never_more_logits_than_a_chunk_exist(tmp_path):
    model, teacher = student(), routed()
    sizes = []
    for one in (model, teacher):
        head = one.get_base_model().get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[:-1].numel()))
    data = rows(4)
    trainer = trainer_for(
        tmp_path, model, teacher, data, options=DistillationOptions(chunk_tokens=5), per_device_train_batch_size=4
    )
    trainer.train()
    assert max(sizes) == 5


def decoder(kind, config, **fields):
    """A tiny decoder whose logits are not its head of its last hidden states, with weights that show it."""
    torch.manual_seed(2)
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    own = tiny.DECODER | dict.fromkeys(("bos_token_id", "sep_token_id", "cls_token_id"), 1) | dropout | fields
    model = kind(config(**own)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


CHANGED = {
    "cap": lambda: decoder(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0),
    "scale": lambda: decoder(CohereForCausalLM, CohereConfig, logit_scale=0.25),
    "BERT": lambda: decoder(BertLMHeadModel, BertConfig, is_decoder=True),
    "RoBERTa": lambda: decoder(RobertaForCausalLM, RobertaConfig, is_decoder=True),
    "ModernBERT": lambda: decoder(
        ModernBertDecoderForCausalLM, ModernBertDecoderConfig, global_attn_every_n_layers=1, reference_compile=False
    ),
}


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("make", CHANGED.values(), ids=CHANGED)
def test_models_that_do_more_than_their_head_are_asked_for_their_logits(tmp_path, make, side):
    model, teacher = (student(make()), routed()) if side == "student" else (student(), make())
    data = rows(4)
    expected, _ = plain_loss(model, teacher, COLLATE(list(data)))
    trainer = trainer_for(tmp_path, model, teacher, data, per_device_train_batch_size=4)
    _, logged = gradients(trainer)
    assert logged["loss"] == pytest.approx(expected, rel=1e-4)
    assert trainer._whole


def test_looking_at_the_head_draws_nothing_and_records_nothing(tmp_path):
    """The first step with a head that is looked at is the step without."""
    results = []
    for known in (None, False):

        class Both(RoutingLossMixin, DistillationMixin, Trainer):
            pass

        model = routed("adamole", num_experts=4, lora_dropout=0.3, routing_losses={"load_balancing": 0.1})
        trainer = trainer_for(tmp_path, model, routed(), kind=Both, per_device_train_batch_size=4)
        trainer._whole = known
        results.append(gradients(trainer))
    assert results[0][1]["loss"] == results[1][1]["loss"]
    assert all(torch.equal(gradient, results[1][0][name]) for name, gradient in results[0][0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_alone_is_told_from_more_in_every_dtype(dtype):
    model = tiny.tiny_llama().to(dtype)
    ids = torch.randint(5, 90, (3, 40))
    with torch.no_grad():
        states, logits = model.model(ids).last_hidden_state, model(ids, logits_to_keep=1).logits
    assert makes_logits(head_of(model), states, logits)
    assert makes_logits(head_of(model), states, model(ids).logits.float())
    assert not makes_logits(head_of(model), states, logits * 1.02)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [(DistillationTrainer, True), (DistillationTrainer, False), (DistillationSFTTrainer, True)],
    ids=["transformers", "without labels", "sft"],
)
def test_accumulation_of_unequal_rows_equals_one_batch(tmp_path, kind, labels):
    options = DistillationOptions(hidden_weight=0.5)
    results = []
    for size, steps in ((4, 1), (1, 4)):
        data = rows(4, labels=labels)
        trainer = trainer_for(
            tmp_path,
            student(init_lora_weights=False),
            train=data,
            kind=kind,
            options=options,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        results.append(gradients(trainer))
    for found, logged in results[1:]:
        for part in ("loss", "distillation/kl", "distillation/hidden"):
            assert logged[part] == pytest.approx(results[0][1][part], rel=1e-4)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, results[0][0][name], rtol=1e-3, atol=1e-6)


def test_prompts_and_padding_do_not_count(tmp_path):
    """Two teachers that differ only where nothing is supervised give the same loss; else another one."""
    losses = []
    for prompt in (1, 4):
        data = rows(4, prompt=prompt)
        expected, _ = plain_loss(student(), routed(), COLLATE(list(data)))
        trainer = trainer_for(tmp_path, student(), routed(), data, per_device_train_batch_size=4)
        losses.append(gradients(trainer)[1]["loss"])
        assert losses[-1] == pytest.approx(expected, rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_batch_without_supervised_tokens_gives_a_zero_gradient(tmp_path):
    data = rows(4, lengths=(5,), prompt=5)
    found, logged = gradients(trainer_for(tmp_path, student(), routed(), data, per_device_train_batch_size=4))
    assert logged["loss"] == 0
    assert all(not gradient.any() for gradient in found.values())
