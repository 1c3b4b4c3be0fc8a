"""Every trainer: a run that is interrupted and resumed is the run that was not."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
import transformers
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from molora import MoLoraConfig
from molora.data.collate import TaskCollator
from molora.trainers import (
    MoLoraDPOTrainer,
    MoLoraGRPOTrainer,
    MoLoraKTOTrainer,
    MoLoraRewardTrainer,
    MoLoraRLOOTrainer,
    MoLoraSeq2SeqTrainer,
    MoLoraSFTTrainer,
    MoLoraTrainer,
)

FIELDS = {
    "num_experts": 4,
    "target_modules": ["q_proj", "down_proj"],
    "init_weights": False,
    "selection": "top_k",
    "top_k": 3,
    # What is drawn, what a rule moves, and what follows the step.
    "lora_dropout": 0.1,
    "router_noise": 0.5,
    "balance_bias_rate": 0.1,
    "routing_losses": {"load_balancing": 0.1},
    "routing_schedules": {"temperature": {"start": 4.0, "end": 1.0}},
}
TEXTS = ["abc", "de", "fghi", "jkl", "mnopq", "rs"]
TIMES = ("runtime", "per_second", "step_time", "train_loss")


def adapted(base, **overrides):
    torch.manual_seed(0)
    return get_peft_model(base, MoLoraConfig.from_preset("mole", **{**FIELDS, **overrides}))


def scorer():
    config = LlamaConfig(**tiny.DECODER, num_labels=1)
    return tiny._seeded(LlamaForSequenceClassification, config, 0)


def tokenized():
    ids = [tiny.tiny_tokenizer()(text).input_ids for text in TEXTS]
    return [{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ids]


def length_reward(completions, **kwargs):
    return [float(len(set(completion))) for completion in completions]


LANGUAGE = [{"input_ids": row["input_ids"], "labels": row["labels"], "task_ids": 0} for row in tokenized()]
PAIRS = [{"prompt": "x", "chosen": text, "rejected": text[::-1] + "z"} for text in TEXTS]
JUDGED = [{"prompt": "x", "completion": text, "label": index % 2 == 0} for index, text in enumerate(TEXTS)]
PROMPTS = [{"prompt": text} for text in TEXTS]
COMPARED = [{key: row[key] for key in ("chosen", "rejected")} for row in PAIRS]
GENERATION = {"max_completion_length": 4, "num_generations": 2, "beta": 0.1}


# Trainer, its arguments, model, rows, further arguments.
CASES = {
    "transformers": (MoLoraTrainer, transformers.TrainingArguments, tiny.tiny_llama, LANGUAGE, {}),
    "seq2seq": (MoLoraSeq2SeqTrainer, transformers.Seq2SeqTrainingArguments, tiny.tiny_t5, tokenized(), {}),
    "sft": (MoLoraSFTTrainer, trl.SFTConfig, tiny.tiny_llama, LANGUAGE, {}),
    "dpo": (MoLoraDPOTrainer, trl.DPOConfig, tiny.tiny_llama, PAIRS, {}),
    "reward": (MoLoraRewardTrainer, trl.RewardConfig, scorer, COMPARED, {}),
    "grpo": (MoLoraGRPOTrainer, trl.GRPOConfig, tiny.tiny_llama, PROMPTS, GENERATION),
    "rloo": (MoLoraRLOOTrainer, trl.RLOOConfig, tiny.tiny_llama, PROMPTS, GENERATION),
    "kto": (MoLoraKTOTrainer, trl.KTOConfig, tiny.tiny_llama, JUDGED, {}),
}


def trainer_for(kind, folder, trainer_class=None, fields=None, **further):
    ours, arguments_class, base, rows, arguments = CASES[kind]
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,  # three steps an epoch
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
        **further,
    }
    tokenizer = tiny.tiny_tokenizer()
    optional = {}
    if kind in ("transformers", "sft"):
        optional["data_collator"] = TaskCollator(pad_token_id=tokenizer.pad_token_id)
    if kind == "seq2seq":
        optional["data_collator"] = transformers.DataCollatorForSeq2Seq(tokenizer)
    if "num_generations" in arguments:
        optional["reward_funcs"] = length_reward
    targets = {"target_modules": ["q", "wo"]} if kind == "seq2seq" else {}
    return (trainer_class or ours)(
        model=adapted(base(), **targets, **(fields or {})),
        args=arguments_class(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **optional,
    )


def without_times(history):
    return [{k: v for k, v in entry.items() if not any(time in k for time in TIMES)} for entry in history]


def assert_same_state(one, other, path=""):
    """Two nested states hold the same, tensors bit by bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same_state(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same_state(*pair, f"{path}.{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other or one != one, path


def assert_same_run(straight, resumed):
    moved = dict(adapted_state(straight))
    assert_same_state(moved, dict(adapted_state(resumed)))
    assert_same_state(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert_same_state(straight.lr_scheduler.state_dict(), resumed.lr_scheduler.state_dict())
    assert straight.model.peft_config["default"].temperature == resumed.model.peft_config["default"].temperature
    assert_same_state(without_times(straight.state.log_history), without_times(resumed.state.log_history), "log")


def adapted_state(trainer):
    return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad or "molora_" in name}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """By kind the uninterrupted run, trained when first asked for."""

    @cache
    def trained(kind):
        trainer = trainer_for(kind, tmp_path_factory.mktemp(kind))
        trainer.train()
        return trainer

    return trained


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("stop", [2, 3], ids=["within an epoch", "between epochs"])
def test_two_halves_are_the_whole(kind, stop, straight, tmp_path):
    whole = straight(kind)
    resumed = trainer_for(kind, tmp_path)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{stop}")
    assert_same_run(whole, resumed)
    assert whole.model.peft_config["default"].temperature != FIELDS["routing_schedules"]["temperature"]["start"]
    assert any(p.abs().max() > 0 for name, p in adapted_state(whole).items() if "molora_bias" in name)


def test_moving_coefficients_go_on(tmp_path):
    losses = {"load_balancing": {"coefficient": 0.005, "adaptive": True}, "l1_sparsity": {"coefficient": 0.1}}
    chosen = {"selection": "threshold", "threshold": 1e-6, "top_k": None}
    fields = {"routing_losses": losses, "gate": "relu", "renormalize": False, **chosen}
    straight = trainer_for("transformers", tmp_path, fields=fields)
    straight.train()
    resumed = trainer_for("transformers", tmp_path, fields=fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(straight, resumed)
    assert_same_state(straight.state.stateful_callbacks["molora"], resumed.state.stateful_callbacks["molora"])
    first, *_, last = [entry for entry in straight.state.log_history if "loss" in entry]
    assert first["molora/l1_sparsity_coefficient"] != last["molora/l1_sparsity_coefficient"]
    assert straight.state.stateful_callbacks["molora"]["coefficients"]["default"].keys() == losses.keys()


@pytest.mark.parametrize(
    "further",
    [
        {"logging_steps": 3},
        {"gradient_accumulation_steps": 2, "logging_steps": 3},
        {"gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
        {"data_seed": 5, "neftune_noise_alpha": 1.0},
    ],
    ids=lambda further: ", ".join(further),
)
@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_so_they_are_with_other_arguments(kind, further, tmp_path):
    straight = trainer_for(kind, tmp_path, **further)
    straight.train()
    assert any("loss" in entry and "molora/load_cv" in entry for entry in straight.state.log_history)
    resumed = trainer_for(kind, tmp_path, **further)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_so_they_are_if_several_steps_learn_from_the_same_answers(kind, stop, tmp_path):
    further = {"steps_per_generation": 2, "num_iterations": 2}  # four steps
    straight = trainer_for(kind, tmp_path, **further)
    straight.train()
    resumed = trainer_for(kind, tmp_path, **further)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert_same_run(straight, resumed)
    assert (tmp_path / f"checkpoint-{stop}" / "answers_0.pth").exists()
    assert not (tmp_path / "checkpoint-4" / "answers_0.pth").exists()


@pytest.mark.parametrize("where", ["transformers", "molora"])
def test_without_molora_a_resumed_log_forgets_what_it_had_gathered(where, tmp_path):
    """Why a checkpoint keeps more than transformers saves."""
    trainer_class = transformers.Trainer if where == "transformers" else None
    losses = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_for("transformers", tmp_path, trainer_class=trainer_class, logging_steps=3)
        trainer.train(resume_from_checkpoint=resume)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert (losses[0] == losses[1]) is (where == "molora")
