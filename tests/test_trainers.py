"""The trainers: routing losses scaled as the task loss is, nothing counted twice, resume exact."""

from __future__ import annotations

import kinds
import pytest
import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOConfig, DPOTrainer, SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from molora import MoLoraConfig, MoloraError
from molora.data.collate import TaskCollator
from molora.routing.inputs import scopes
from molora.trainers import MoLoraSFTTrainer, MoLoraTrainer, RoutingLossMixin

TRAINERS = {"transformers": (MoLoraTrainer, TrainingArguments), "sft": (MoLoraSFTTrainer, SFTConfig)}


def rows(count: int = 8, lengths: tuple[int, ...] = (5, 9, 7, 12)) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for index in range(count):
        ids = torch.randint(5, 90, (lengths[index % len(lengths)],), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "task_ids": index % 2})
    return Dataset.from_list(examples)


def adapted(preset: str = "adamole", **overrides):
    torch.manual_seed(0)
    fields = {"num_experts": 4, "target_modules": "all-linear", "init_weights": False, **overrides}
    return get_peft_model(tiny.tiny_llama(), MoLoraConfig.from_preset(preset, **fields))


def trainer_for(kind, tmp_path, model=None, train=None, **arguments):
    trainer_class, arguments_class = TRAINERS[kind]
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    tokenizer = tiny.tiny_tokenizer()
    return trainer_class(
        model=model or adapted(),
        args=arguments_class(**settings),
        train_dataset=train if train is not None else rows(),
        processing_class=tokenizer,
        data_collator=TaskCollator(pad_token_id=tokenizer.pad_token_id),
    )


def gradients(kind, tmp_path, coefficient, model=None, **arguments):
    """Gradients of the adapter's parameters at the first optimizer step, before clipping."""
    trainer = trainer_for(
        kind,
        tmp_path,
        model or adapted(routing_losses={"load_balancing": coefficient}),
        **{"max_steps": 1, "max_grad_norm": 0.0, **arguments},
    )
    return kinds.gradients(trainer)


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_eight_accumulated_batches_of_one_equal_one_batch_of_eight(kind, coefficient, tmp_path):
    whole = gradients(kind, tmp_path, coefficient, per_device_train_batch_size=8)
    accumulated = gradients(kind, tmp_path, coefficient, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same(whole, accumulated, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_routing_loss_is_averaged_not_summed_over_accumulated_batches(kind, tmp_path):
    """Two identical micro-batches add the gradient of one, whatever the loss and its scope."""
    losses = {"load_balancing": {"coefficient": 1.0, "scope": "batch"}}
    settings = {"per_device_train_batch_size": 4, "train": rows(1).select([0] * 8)}

    def added(**accumulation):
        without = gradients(kind, tmp_path, 0.0, adapted("mole", routing_losses={}), **settings, **accumulation)
        with_loss = gradients(kind, tmp_path, 0.0, adapted("mole", routing_losses=losses), **settings, **accumulation)
        return {name: with_loss[name] - without[name] for name in without if "router" in name}

    once, twice = added(), added(gradient_accumulation_steps=2)
    assert all(gradient.abs().max() > 1e-5 for gradient in once.values())
    assert_same(once, twice, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", TRAINERS)
def test_gradient_checkpointing_changes_no_gradient_and_counts_nothing_twice(kind, tmp_path):
    plain = gradients(kind, tmp_path, 0.5, per_device_train_batch_size=4)
    again = gradients(
        kind,
        tmp_path,
        0.5,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    assert_same(plain, again, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["routing_losses", "balance_bias_rate"])
def test_reentrant_checkpointing_is_refused_because_it_would_lose_what_routing_learns_from(what, tmp_path):
    fields = {"routing_losses": {"load_balancing": 0.01} if what == "routing_losses" else {}}
    trainer = trainer_for(
        "transformers",
        tmp_path,
        adapted(**fields, balance_bias_rate=0.01 if what == "balance_bias_rate" else None),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(RuntimeError, match=f"{what} of adapter.*use_reentrant"):
        trainer.train()


@pytest.mark.parametrize("kind", TRAINERS)
def test_resuming_continues_parameter_exact(kind, tmp_path):
    straight = trainer_for(kind, tmp_path / "straight", max_steps=4, per_device_train_batch_size=2)
    straight.train()
    first = trainer_for(
        kind, tmp_path / "parts", max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2
    )
    first.train()
    resumed = trainer_for(
        kind, tmp_path / "parts", max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    expected = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("kind", TRAINERS)
def test_evaluation_loss_is_the_task_loss_alone(kind, tmp_path):
    losses = []
    for coefficient in (0.0, 100.0):
        model = adapted(routing_losses={"load_balancing": coefficient})
        losses.append(trainer_for(kind, tmp_path, model).evaluate(rows())["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", TRAINERS)
def test_routing_is_logged_beside_the_loss(kind, tmp_path):
    trainer = trainer_for(kind, tmp_path)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 1 <= logged["molora/experts_per_token"] <= 4
    assert 0.25 <= logged["molora/load_max"] <= 1
    assert 0 < logged["molora/entropy"] <= torch.tensor(4.0).log().item() + 1e-6
    assert 0 < logged["molora/threshold_mean"] < 0.25
    assert logged["molora/load_balancing"] >= 0.9


@pytest.mark.parametrize("kind", TRAINERS)
def test_padding_does_not_count(kind, tmp_path):
    """The gradient of a padded batch is that of the same rows one by one, without padding."""
    padded = gradients(kind, tmp_path, 1.0, per_device_train_batch_size=4, train=rows(4))
    single = gradients(
        kind, tmp_path, 1.0, per_device_train_batch_size=1, gradient_accumulation_steps=4, train=rows(4)
    )
    assert_same(padded, single, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRAINERS)
def test_task_ids_reach_the_trainer_and_not_the_model(kind, tmp_path):
    trainer = trainer_for(kind, tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer.train()
    assert sorted(trainer.task_ids.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_task_ids_are_taken_out_of_transformers_own_batches_too(tmp_path):
    """Its padding collators return a mapping that is no dict."""
    trainer = trainer_for("transformers", tmp_path, max_steps=1, per_device_train_batch_size=8)
    trainer.data_collator = DataCollatorForSeq2Seq(tiny.tiny_tokenizer())
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    assert seen
    assert not any("task_ids" in names for names in seen)
    assert sorted(trainer.task_ids.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_padding_of_a_decoder_is_found_even_when_the_trainer_keeps_the_labels(smoothing, tmp_path):
    config = MoLoraConfig.from_preset("adamole", num_experts=4, target_modules="all-linear")
    trainer = trainer_for("transformers", tmp_path, get_peft_model(tiny.tiny_t5(), config), max_steps=1)
    trainer.label_smoother = LabelSmoother(smoothing) if smoothing else None
    batch = {
        "input_ids": torch.full((2, 4), 9),
        "attention_mask": torch.ones(2, 4),
        "decoder_input_ids": torch.tensor([[0, 5, 6], [0, 8, 0]]),
        "labels": torch.tensor([[5, 6, 7], [8, -100, -100]]),
    }
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, batch)
    _, tallies = trainer._metrics_of_routing.take()
    counted = tallies["molora/"]
    tokens = dict(zip(counted.layers, counted.tokens.tolist(), strict=True))
    assert {count for name, count in tokens.items() if "decoder" in name and "SelfAttention" in name} == {4}


@pytest.mark.parametrize("preset", ["static", "lora"])
def test_mixtures_without_a_token_router_train_too(preset, tmp_path):
    model = adapted(preset, **({} if preset == "static" else {"num_experts": 1}))
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer_for("sft", tmp_path, model).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("kind", TRAINERS)
def test_losses_that_compare_tasks_get_the_task_of_every_row(kind, tmp_path):
    losses = {"mutual_information": 1.0, "localized_balancing": 1.0}
    trainer = trainer_for(kind, tmp_path, adapted("mole", routing_losses=losses), per_device_train_batch_size=4)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["molora/mutual_information"] < 0
    assert logged["molora/localized_balancing"] > 0


@pytest.mark.parametrize(("preset", "read"), [("mole", False), ("smear", True)])
def test_prompts_reach_only_routing_that_reads_them(preset, read, tmp_path):
    """Checking them waits for the device, in every step."""
    model = adapted(preset)
    trainer = trainer_for("sft", tmp_path, model, max_steps=1)
    [scope] = scopes(model)
    given = []
    model.register_forward_pre_hook(lambda *_: given.append(scope.inputs.prompt_mask is not None))
    trainer.train()
    assert given == [read]


@pytest.mark.parametrize("kind", TRAINERS)
def test_data_without_task_ids_are_an_error_that_says_what_to_add(kind, tmp_path):
    model = adapted("mole", routing_losses={"mutual_information": 1.0})
    trainer = trainer_for(kind, tmp_path, model, train=rows().remove_columns("task_ids"))
    with pytest.raises(MoloraError, match="a task_ids column in the dataset"):
        trainer.train()


def test_trls_own_collator_keeps_task_ids_too(tmp_path):
    losses = {"mutual_information": 1.0}
    trainer = trainer_for("sft", tmp_path, adapted("mole", routing_losses=losses), per_device_train_batch_size=8)
    trainer.data_collator = DataCollatorForLanguageModeling(pad_token_id=0)
    trainer.train()
    assert sorted(trainer.task_ids.tolist()) == [0, 0, 0, 0, 1, 1, 1, 1]


BALANCED = {"preset": "mole", "selection": "top_k", "top_k": 2, "routing_losses": {}, "balance_bias_rate": 0.5}


def biases(model):
    return {name: p.clone() for name, p in model.named_parameters() if "molora_bias" in name}


@pytest.mark.parametrize("kind", TRAINERS)
def test_balancing_biases_move_once_a_step_whatever_the_accumulation(kind, tmp_path):
    def trained(**arguments):
        model = adapted(**BALANCED)
        trainer = trainer_for(kind, tmp_path, model, max_steps=1, **arguments)
        trainer.evaluate(rows())
        assert all((bias == 0).all() for bias in biases(model).values()), "evaluation moved a bias"
        trainer.train()
        return biases(model)

    whole = trained(per_device_train_batch_size=8)
    accumulated = trained(per_device_train_batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True)
    assert whole
    assert_same(whole, accumulated)
    assert {value for bias in whole.values() for value in bias.abs().unique().tolist()} <= {0.0, 0.5}
    assert all((bias > 0).any() and (bias < 0).any() for bias in whole.values())


def test_a_resumed_run_continues_biases_and_schedules(tmp_path):
    fields = {
        **BALANCED,
        "top_k": 4,
        "renormalize": False,
        "routing_schedules": {"top_k": {"start": 4, "end": 1}, "temperature": {"start": 4.0, "end": 1.0}},
    }

    def trainer(folder):
        model = adapted(**fields)
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
        return trainer_for("transformers", folder, model, **saving)

    straight = trainer(tmp_path)
    straight.train()
    half = MoLoraConfig.from_pretrained(str(tmp_path / "checkpoint-2"))
    assert (half.top_k, half.temperature) == (3, 3.0)
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(straight.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert resumed.model.peft_config["default"].top_k == 1
    specs = [spec for module in resumed.model.modules() for spec in getattr(module, "molora_spec", {}).values()]
    assert specs
    assert {(spec.top_k, spec.temperature) for spec in specs} == {(1, 1.0)}


class PreferenceTrainer(RoutingLossMixin, DPOTrainer):
    pass


def test_preference_pairs_have_the_task_of_their_row(tmp_path):
    data = [{"prompt": "ab", "chosen": "c" * (1 + i), "rejected": "dd", "task_ids": i % 2} for i in range(4)]
    arguments = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = PreferenceTrainer(
        model=adapted("mole", routing_losses={"mutual_information": 1.0}),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        eval_dataset=Dataset.from_list(data),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.train()
    assert len(trainer.task_ids) == 8
    assert trainer.task_ids.tolist() == trainer.task_ids[:4].tolist() * 2
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["molora/mutual_information"] < 0
    trainer.evaluate()
    assert len(trainer.task_ids) == 8
