"""Where a routing loss goes wrong without anyone noticing: one test for each way."""

from __future__ import annotations

import sys

import kinds
import pytest
import tiny
import torch
import transformers
from accelerate.utils import is_peft_model
from datasets import Dataset
from kinds import KINDS, gradients, model_for, trainer_for, training_log
from methods import MOE_MODELS
from peft import PeftModel, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    LlamaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    TrainingArguments,
)
from trl import SFTConfig

from molora import MoLoraConfig, MoloraError
from molora.routing.record import record_routing
from molora.trainers import MoLoraSFTTrainer, MoLoraTrainer
from molora.trainers.columns import ColumnCollator

ONCE = {"max_steps": 1, "max_grad_norm": 0.0}
LOSSES = {"load_balancing": 0.5, "router_z": 0.2}


def ids(rows=3, length=7, seed=5):
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def router_gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if "router" in n and p.grad is not None}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    assert a
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def checkpointed(model, on: bool):
    model.train()
    if on:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def test_a_pass_that_runs_before_the_backward_pass_does_not_disturb_the_recomputation():
    """What was padding, and which task a row has, belongs to the pass and not to the layer."""
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:] = 0

    def trained(checkpointing, disturbed):
        adapter = kinds.config("smear", target_modules=["q_proj", "down_proj"])
        model = checkpointed(model_for("sft", adapter), checkpointing)
        loss = model(input_ids=ids(), attention_mask=mask).logits.logsumexp(-1).mul(mask).sum()
        if disturbed:
            with torch.no_grad():
                model(input_ids=ids(2, 5), attention_mask=torch.ones(2, 5, dtype=torch.long))
        loss.backward()
        return router_gradients(model)

    assert_same(trained(False, False), trained(True, True), rtol=1e-4, atol=1e-6)


RANDOM = {
    "noise on logits": {"router_noise": 0.5},
    "dropped experts": {"expert_dropout": 0.3},
    "Gumbel noise": {"gate": "gumbel_softmax"},
    "jitter": {"router_jitter": 0.2},
    "sparsemixer": {"selection": "sparsemixer", "top_k": 2, "renormalize": False, "router_jitter": 0.1},
    "dropout of the input": {"lora_dropout": 0.3},
}


@pytest.mark.parametrize("case", RANDOM)
def test_recomputation_draws_what_the_first_pass_drew(case):
    def trained(checkpointing):
        model = checkpointed(model_for("sft", kinds.config("mole", **RANDOM[case])), checkpointing)
        torch.manual_seed(4)
        model(input_ids=ids(), labels=ids()).loss.backward()
        return router_gradients(model)

    assert_same(trained(False), trained(True), rtol=1e-4, atol=1e-7)


def test_experts_that_no_token_chose_have_a_gradient_of_zero_and_not_none():
    """Data-parallel training waits for the gradient of every parameter."""
    model = model_for(
        "sft", kinds.config("mole", selection="top_k", top_k=1, renormalize=False, num_experts=8)
    ).train()
    model(input_ids=ids(1, 2), labels=ids(1, 2)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert any((p.grad == 0).all(dim=-1).any() for name, p in trained.items() if "molora_A" in name)


def test_the_routing_loss_is_in_the_loss_that_is_scaled(tmp_path):
    """A scaler for half precision multiplies the whole loss, so what is added elsewhere would be too small."""

    def scaled(by):
        trainer = trainer_for("transformers", tmp_path, model_for("transformers", kinds.config(routing_losses=LOSSES)))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "labels": ids()}
        (trainer.compute_loss(trainer.model, batch) * by).backward()
        return router_gradients(trainer.model)

    assert_same({name: value * 1024 for name, value in scaled(1).items()}, scaled(1024), rtol=1e-4, atol=1e-5)


def test_a_training_step_never_waits_for_the_device(tmp_path, monkeypatch):
    trainer = trainer_for("transformers", tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "labels": ids()}
    batch["task_ids"] = torch.tensor([0, 1, 2])

    ours = []

    def watched(name):
        own = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            ours.extend([f"{name} in {caller}"] * caller.startswith("molora"))  # transformers reads its masks
            return own(tensor, *args, **kwargs)

        return read

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    loss = trainer.compute_loss(trainer.model, batch)
    monkeypatch.undo()
    assert ours == []
    assert loss.item() > 0


@pytest.mark.parametrize("kind", ["seq2seq", "grpo"])
def test_generation_leaves_nothing_behind(kind, tmp_path):
    extra = {"predict_with_generate": True} if kind == "seq2seq" else {}
    trainer = trainer_for(kind, tmp_path, **extra)
    trainer.train()
    trainer.evaluate()
    assert all(layer.routing_recorder is None for layer in kinds.adapted_layers(trainer.model))
    with record_routing(trainer.model) as records:
        pass
    trainer.model.generate(input_ids=ids(1, 3), max_new_tokens=3)
    assert records == []


@pytest.mark.parametrize("kind", KINDS)
def test_trainers_see_a_peft_model(kind):
    """By that they find the reference, the base model and what may be saved."""
    assert is_peft_model(model_for(kind))


def test_a_fused_head_changes_no_routing_loss(tmp_path):
    """TRL computes the task loss in pieces from the hidden states; transformers from the logits."""
    losses = {"load_balancing": 0.5, "router_z": 0.2, "router_entropy": 0.1, "mutual_information": 0.3}
    logs, grads = [], []
    for kind in ("transformers", "sft"):
        trainer = trainer_for(kind, tmp_path, model_for(kind, kinds.config(routing_losses=losses)), **ONCE)
        grads.append(gradients(trainer))
        logs.append({name: value for name, value in training_log(trainer).items() if name.startswith("molora/")})
    assert_same(*grads, rtol=1e-3, atol=1e-6)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6)
    assert {f"molora/{name}" for name in losses} <= logs[0].keys()


@pytest.mark.parametrize("kind", ["olmoe", "mixtral"])
def test_a_base_model_with_experts_keeps_its_own_balancing_off(kind, tmp_path):
    """Its routers are frozen: their loss would only disturb the adapter."""
    torch.manual_seed(0)
    base = MOE_MODELS[kind]()
    fields = {"num_experts": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    model = get_peft_model(base, MoLoraConfig.from_preset("mole", **fields, routing_losses=LOSSES))
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append(output.get("aux_loss")))
    trainer = trainer_for("transformers", tmp_path, model, **ONCE)
    trainer.train()
    assert seen
    assert set(seen) == {None}
    assert not base.config.output_router_logits
    assert training_log(trainer)["molora/load_balancing"] >= 0.99


def test_a_recording_model_compiles_to_one_graph():
    preset, fields = "mole", {"num_experts": 4, "target_modules": ["q_proj", "v_proj"]}
    grads, counts = [], []
    for compiled in (False, True):
        model = model_for("sft", kinds.config(preset, **fields)).train()
        base = model.get_base_model()
        run = torch.compile(base, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else base
        torch._dynamo.reset()
        with record_routing(base) as records:
            loss = run(input_ids=ids(), use_cache=False).logits.logsumexp(-1).mean()
        counts.append(len(records))
        added = sum(record.routing.probabilities.square().mean() for record in records)
        (loss + added).backward()
        grads.append(router_gradients(model))
    assert counts[0] == counts[1] > 0
    assert_same(*grads, rtol=1e-4, atol=1e-6)


def classified(count=8):
    return [{"input_ids": kinds.encoded("abcdefgh"[: 2 + i % 5]), "labels": i % 3} for i in range(count)]


def classifier(kind):
    if kind == "bert":
        return tiny.tiny_bert_classifier(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            fields = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
            fields |= {"vocab_size": len(tiny.VOCABULARY), "num_labels": 3, "decoder_start_token_id": 0}
            return T5ForSequenceClassification(T5Config(**fields, pad_token_id=0, eos_token_id=3)).eval()
        return LlamaForSequenceClassification(kinds.LlamaConfig(**tiny.DECODER, num_labels=3)).eval()


def classification_trainer(kind, folder, fields, **arguments):
    fields = {"num_experts": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS", **fields}
    if kind == "t5":  # PEFT knows other names of heads
        fields["modules_to_save"] = ["classification_head"]
        fields["target_modules"] = r".*\.(encoder|decoder)\..*\.(q|k|v|o|wi|wo)"
    torch.manual_seed(0)
    model = get_peft_model(classifier(kind), MoLoraConfig.from_preset("mole", **fields))
    tokenizer = tiny.tiny_tokenizer()
    rows = classified()
    if kind == "t5":  # classifies by the last end of a sequence
        rows = [{**row, "input_ids": [*row["input_ids"], 3]} for row in rows]
    return MoLoraTrainer(
        model,
        TrainingArguments(output_dir=str(folder), **{**kinds.COMMON, **arguments}),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_sequence_classification_trains_and_its_head_is_saved(kind, tmp_path):
    trainer = classification_trainer(kind, tmp_path, {"routing_losses": LOSSES})
    heads = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "modules_to_save" in n}
    trainer.train()
    logged = training_log(trainer)
    assert logged["molora/load_balancing"] >= 0.99
    assert logged["molora/router_z"] >= 0
    after = dict(trainer.model.named_parameters())
    assert heads
    assert all(not torch.equal(after[name], value) for name, value in heads.items())
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(classifier(kind), str(tmp_path / "saved"))
    batch = {"input_ids": torch.tensor([[5, 6, 7, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model(**batch).logits)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_padding_of_classified_rows_does_not_count(kind, tmp_path):
    # An untrained adapter changes nothing, so its routers learn from the routing loss alone.
    losses = {"routing_losses": {"load_balancing": 1.0}}
    settings = (
        {**ONCE, "per_device_train_batch_size": 8},
        {
            **ONCE,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
        },
    )
    together, alone = (gradients(classification_trainer(kind, tmp_path, losses, **given)) for given in settings)
    together, alone = ({name: g for name, g in grads.items() if "router" in name} for grads in (together, alone))
    assert all(gradient.abs().max() > 1e-6 for gradient in together.values())
    assert_same(together, alone, rtol=1e-3, atol=1e-7)


def real_tokens(records):
    """Real tokens of each linear, per pass."""
    return {
        record.layer: int(record.mask.sum()) if record.mask is not None else record.routing.logits.shape[:-1].numel()
        for record in records
    }


def test_an_encoder_decoder_counts_the_tokens_of_either_side(tmp_path):
    trainer = trainer_for("seq2seq", tmp_path, **ONCE, per_device_train_batch_size=8)
    with record_routing(trainer.model) as records:
        trainer.train()
    rows = kinds.both_sides()
    source, target = (sum(len(row[side]) for row in rows) for side in ("input_ids", "labels"))
    assert source != target
    counted = real_tokens(records)
    assert {n for name, n in counted.items() if ".encoder." in name or "EncDecAttention.k" in name} == {source}
    assert {n for name, n in counted.items() if ".decoder." in name and "SelfAttention" in name} == {target}
    assert {n for name, n in counted.items() if "EncDecAttention.q" in name} == {target}


@pytest.mark.parametrize("beams", [1, 2])
def test_an_encoder_decoder_generates_with_the_tasks_of_its_rows(beams, tmp_path):
    settings = {"predict_with_generate": True, "generation_num_beams": beams, "generation_max_length": 6}
    model = model_for("seq2seq", kinds.config("polytropon", num_tasks=3))
    for name, table in model.named_parameters():
        if "router" in name:  # tasks that do not differ would hide that they are mixed up
            torch.nn.init.normal_(table, std=3)
        elif "molora_" in name:
            torch.nn.init.normal_(table, std=0.5)
    trainer = trainer_for("seq2seq", tmp_path, model, **settings)
    trainer.train()
    rows = kinds.both_sides(4)
    answers = trainer.predict(Dataset.from_list(rows)).predictions
    others = [{**row, "task_ids": (row["task_ids"] + 1) % 3} for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        expected = model.generate(
            input_ids=torch.tensor([row["input_ids"]]),
            task_ids=torch.tensor([row["task_ids"]]),
            num_beams=beams,
            max_length=6,
        )[0]
        assert answer[: len(expected)].tolist() == expected.tolist()
    assert (trainer.predict(Dataset.from_list(others)).predictions != answers).any()


@pytest.mark.parametrize("coefficient", [None, 0.0])
def test_trls_own_switch_for_a_base_models_balancing_is_left_to_it(coefficient, tmp_path):
    """TRL turns it on by itself where the model has one; `router_aux_loss_coef=0.0` turns it off."""
    torch.manual_seed(0)
    base = MOE_MODELS["mixtral"]()
    adapter = MoLoraConfig.from_preset("mole", num_experts=4, target_modules=["q_proj"], routing_losses=LOSSES)
    trainer = MoLoraSFTTrainer(
        get_peft_model(base, adapter),
        args=SFTConfig(output_dir=str(tmp_path), **kinds.COMMON, router_aux_loss_coef=coefficient),
        train_dataset=Dataset.from_list(kinds.causal()),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.train()
    logged = training_log(trainer)
    assert ("aux_loss" in logged) == (coefficient is None)
    assert "molora/load_balancing" in logged


def test_the_best_model_is_routed_as_it_was_when_it_was_best(tmp_path):
    """Its weights come back, and so must what its schedules had come to."""
    model = model_for("transformers", kinds.config(top_k=4, routing_schedules={"top_k": {"start": 4, "end": 2}}))
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = trainer_for(
        "transformers", tmp_path, model=model, load_best_model_at_end=True, greater_is_better=True, **saving
    )  # the greatest loss is that of the first step
    trainer.train()
    assert trainer.model.peft_config["default"].top_k == {1: 4, 2: 3}[trainer.state.best_global_step]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_second_training_logs_nothing_of_the_first(tmp_path):
    trainer = trainer_for("transformers", tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    assert trainer._metrics_of_routing._values
    trainer._start_anew()
    assert not trainer._metrics_of_routing._values


def test_a_trainer_leaves_routing_parameters_where_it_has_moved_them(tmp_path, monkeypatch):
    """Only rounding is undone; on a GPU the move to the device would have been too."""
    monkeypatch.setattr(transformers.Trainer, "_move_model_to_device", lambda self, model, device: model.double())
    trainer = trainer_for("transformers", tmp_path)
    assert {p.dtype for name, p in trainer.model.named_parameters() if "molora_router" in name} == {torch.float64}


def test_columns_of_the_last_batch_are_not_those_of_the_next(tmp_path):
    trainer = trainer_for("transformers", tmp_path)
    trainer.train()
    assert trainer.task_ids is not None
    trainer.model.train()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[5, 6, 7]])}
    with pytest.raises(MoloraError, match="got no task ids"):
        trainer.compute_loss(trainer.model, batch)


def test_a_column_that_is_empty_in_some_rows_is_explained():
    rows = [{"input_ids": [5], "task_ids": 1}, {"input_ids": [6], "task_ids": None}]
    with pytest.raises(MoloraError, match="some rows have a task_ids column and 1 in this batch"):
        ColumnCollator(lambda given: {"input_ids": torch.tensor([row["input_ids"] for row in given])})(rows)
