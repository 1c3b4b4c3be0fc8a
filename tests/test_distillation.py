"""Distillation: the loss is the formula, whole or in chunks, the teacher stays as it is, and students get closer."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
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
    TrainingArguments,
)
from trl import SFTConfig

from molora import MoLoraConfig, MoloraError
from molora.data.collate import TaskCollator
from molora.trainers import (
    DistillationMixin,
    DistillationOptions,
    DistillationSFTTrainer,
    DistillationTrainer,
    MoLoraTrainer,
    RoutingLossMixin,
    distil,
)
from molora.trainers.distillation_loss import (
    Predictions,
    head_of,
    makes_logits,
    sum_of_hidden_errors,
    sums_of_predictions,
)

COLLATE = TaskCollator(pad_token_id=tiny.VOCABULARY[tiny.PAD])


def rows(count: int = 8, lengths=(5, 9, 7, 12), labels: bool = True, prompt: int = 2, **columns) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        ids = torch.randint(5, 90, (lengths[index % len(lengths)],), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
        if not labels:
            del examples[-1]["labels"]
        examples[-1] |= {name: values[index % len(values)] for name, values in columns.items()}
    return Dataset.from_list(examples)


def student(base=None, seed: int = 0, **fields):
    torch.manual_seed(seed)
    options = {"r": 8, "target_modules": "all-linear", "init_lora_weights": True, **fields}
    return get_peft_model(tiny.tiny_llama() if base is None else base, LoraConfig(task_type="CAUSAL_LM", **options))


def routed(preset: str = "molora", base=None, **fields):
    torch.manual_seed(5)
    options = {"target_modules": "all-linear", "init_weights": False, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(tiny.tiny_llama() if base is None else base, MoLoraConfig.from_preset(preset, **options))


def collate_without_labels(examples):
    length = max(len(row["input_ids"]) for row in examples)
    pad = [[0] * (length - len(row["input_ids"])) for row in examples]
    ids = [row["input_ids"] + fill for row, fill in zip(examples, pad, strict=True)]
    masks = [[1] * len(row["input_ids"]) + fill for row, fill in zip(examples, pad, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}


def trainer_for(folder, model=None, teacher=None, train=None, kind=DistillationTrainer, options=None, **arguments):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    sft = issubclass(kind, DistillationSFTTrainer)
    return kind(
        model=student() if model is None else model,
        args=SFTConfig(bf16=False, gradient_checkpointing=False, **settings) if sft else TrainingArguments(**settings),
        train_dataset=rows() if train is None else train,
        data_collator=collate_without_labels if "labels" not in (train or rows()).column_names else COLLATE,
        teacher=routed() if teacher is None else teacher,
        distillation=options,
        **({"processing_class": tiny.tiny_tokenizer()} if sft else {}),
    )


def gradients(trainer):
    """Gradients of the trained parameters at the first optimizer step, and the loss that was logged."""
    found = {}
    optimizer_step = torch.optim.AdamW.step

    def kept(optimizer, *args, **kwargs):
        if not found:
            named = trainer.model.named_parameters()
            found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return optimizer_step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", kept)
        trainer.train()
    return found, next(entry for entry in trainer.state.log_history if "loss" in entry)


def plain_loss(own, other, batch, temperature=1.0, hidden=0.0, task=0.0, layers=(1, 2)):
    """The loss of a batch as its formula says, in fp64: one token after the other."""
    own, other = copy.deepcopy(own).double(), copy.deepcopy(other).double().eval()
    labels = batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "output_hidden_states": True}
    mine = own(**inputs)
    with torch.no_grad():
        theirs = other(**inputs)
    total, count = 0.0, 0
    for row in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            if labels[row, place + 1] == -100:
                continue
            log_q = torch.log_softmax(mine.logits[row, place] / temperature, -1)
            p = torch.softmax(theirs.logits[row, place] / temperature, -1)
            total = total + temperature**2 * (p * (p.log() - log_q)).sum()
            total = total - task * torch.log_softmax(mine.logits[row, place], -1)[labels[row, place + 1]]
            for layer in layers:
                s, t = mine.hidden_states[layer][row, place], theirs.hidden_states[layer][row, place]
                total = total + hidden * ((s - t) ** 2).sum() / (t**2).sum() / len(layers)
            count += 1
    loss = total / count
    loss.backward()
    return loss.item(), {name: p.grad for name, p in own.named_parameters() if p.grad is not None}


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
