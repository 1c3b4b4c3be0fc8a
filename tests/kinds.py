"""One small run of every trainer, over the same few rows, whose first token says the task."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForSequenceClassification,
    Seq2SeqTrainingArguments,
    TrainingArguments,
)
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, RLOOConfig, SFTConfig

from molora import MoLoraConfig
from molora import trainers as ours
from molora.bank import MoLoraLayer
from molora.data.collate import TaskCollator

TASKS = "xyz"
"""The first letter of each prompt; its index is the task."""

LOSSES = {"load_balancing": 0.3, "router_z": 0.1, "router_entropy": 0.1, "mutual_information": 0.2}
COMMON = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
}
GREEDY = {"num_generations": 2, "max_completion_length": 4, "generation_kwargs": {"do_sample": False}}


def encoded(text: str) -> list[int]:
    return tiny.tiny_tokenizer()(text)["input_ids"]


def prompts(count: int = 8) -> list[dict]:
    return [{"prompt": TASKS[i % 3] + "abcdef"[: 1 + i % 5], "task_ids": i % 3} for i in range(count)]


def causal(count: int = 8) -> list[dict]:
    rows = []
    for index, row in enumerate(prompts(count)):
        start, answer = encoded(row["prompt"]), encoded("ghijkl"[: 2 + index % 4])
        labels = [-100] * len(start) + answer
        rows.append({"input_ids": start + answer, "labels": labels, "task_ids": row["task_ids"]})
    return rows


def both_sides(count: int = 8) -> list[dict]:
    return [
        {"input_ids": encoded(row["prompt"]), "labels": encoded("ghijkl"[: 2 + i % 4]), "task_ids": row["task_ids"]}
        for i, row in enumerate(prompts(count))
    ]


def pairs(count: int = 8) -> list[dict]:
    return [{**row, "chosen": "gh"[: 1 + i % 2], "rejected": "ijk"} for i, row in enumerate(prompts(count))]


def judged(count: int = 8) -> list[dict]:
    return [{**row, "completion": "ghij"[: 1 + i % 4], "label": i % 2 == 0} for i, row in enumerate(prompts(count))]


def longer_is_better(completions: list[str], **columns) -> list[float]:
    return [float(len(text)) for text in completions]


def tiny_judge() -> LlamaForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**tiny.DECODER, num_labels=1)).eval()


def config(preset: str = "mole", **overrides) -> MoLoraConfig:
    fields = {"num_experts": 4, "target_modules": "all-linear", "init_weights": False, **overrides}
    return MoLoraConfig.from_preset(preset, **fields)


def by_task(**overrides) -> MoLoraConfig:
    """A router that reads nothing but the task."""
    return config("moelora", **{"num_tasks": 3, "router_dim": 5, "routing_losses": {}, **overrides})


KINDS = {
    "transformers": (ours.MoLoraTrainer, TrainingArguments, causal, {}),
    "seq2seq": (ours.MoLoraSeq2SeqTrainer, Seq2SeqTrainingArguments, both_sides, {}),
    "sft": (ours.MoLoraSFTTrainer, SFTConfig, causal, {}),
    "dpo": (ours.MoLoraDPOTrainer, DPOConfig, pairs, {}),
    "reward": (ours.MoLoraRewardTrainer, RewardConfig, pairs, {}),
    "kto": (ours.MoLoraKTOTrainer, KTOConfig, judged, {}),
    "grpo": (ours.MoLoraGRPOTrainer, GRPOConfig, prompts, GREEDY),
    "rloo": (ours.MoLoraRLOOTrainer, RLOOConfig, prompts, {**GREEDY, "beta": 0.1}),
}
"""The class, its arguments, its data, and what else it is given."""

ONLINE = ("grpo", "rloo")


def base_of(kind: str):
    if kind == "seq2seq":
        return tiny.tiny_t5(dropout_rate=0.0)
    return tiny_judge() if kind == "reward" else tiny.tiny_llama()


def model_for(kind: str, adapter: MoLoraConfig | None = None):
    """A base model that fits, adapted."""
    adapter = config(routing_losses=LOSSES) if adapter is None else adapter
    adapter.task_type = {"seq2seq": "SEQ_2_SEQ_LM", "reward": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
    torch.manual_seed(0)
    return get_peft_model(base_of(kind), adapter)


def trainer_for(kind, folder, model=None, train=None, evaluate=None, **arguments):
    """A trainer of a kind; `train` is a number of rows, or rows."""
    trainer_class, arguments_class, data, extra = KINDS[kind]
    tokenizer = tiny.tiny_tokenizer()
    given = {
        "model": model if model is not None else model_for(kind),
        "args": arguments_class(output_dir=str(folder), **{**COMMON, **extra, **arguments}),
        "train_dataset": Dataset.from_list(train if train is not None else data()),
        "eval_dataset": Dataset.from_list(evaluate if evaluate is not None else data(4)),
        "processing_class": tokenizer,
    }
    if kind in ("transformers", "sft"):
        given["data_collator"] = TaskCollator(pad_token_id=tokenizer.pad_token_id)
    if kind == "seq2seq":
        given["data_collator"] = DataCollatorForSeq2Seq(tokenizer, model=given["model"])
    if kind in ONLINE:
        given["reward_funcs"] = longer_is_better
    return trainer_class(**given)


def gradients(trainer) -> dict[str, torch.Tensor]:
    """Gradients of the adapter's parameters at the first optimizer step, before clipping."""
    caught = {}

    def keep(*args, **kwargs):
        caught.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer.register_step_pre_hook(keep)
    trainer.train()
    return caught


def adapted_layers(model) -> list[MoLoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoLoraLayer)]


def training_log(trainer) -> dict[str, float]:
    """What the first step logged."""
    return next(entry for entry in trainer.state.log_history if "loss" in entry)
