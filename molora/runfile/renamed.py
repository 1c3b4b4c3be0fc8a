"""Keys of other tools, older versions and `SFTConfig` that a run file refuses, each with what to do instead."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    # TrainingArguments before transformers 5.
    "warmup_ratio": "write `warmup_steps: 0.1`; a value below 1 is a ratio of all steps.",
    "group_by_length": "write `train_sampling_strategy: group_by_length`.",
    "logging_dir": "was removed from transformers; set the environment variable TENSORBOARD_LOGGING_DIR.",
    "overwrite_output_dir": "is called `overwrite` here.",
    "save_safetensors": "was removed; safetensors is always written.",
    "evaluation_strategy": "is now called `eval_strategy`.",
    "no_cuda": "is now called `use_cpu`.",
    "include_tokens_per_second": "was removed; use `include_num_input_tokens_seen`.",
    "per_gpu_train_batch_size": "is now called `per_device_train_batch_size`.",
    "per_gpu_eval_batch_size": "is now called `per_device_eval_batch_size`.",
    "half_precision_backend": "was removed; set `bf16` or `fp16`.",
    "fp16_backend": "was removed; set `bf16` or `fp16`.",
    "adafactor": "was removed; write `optim: adafactor`.",
    "push_to_hub_model_id": "is now called `hub_model_id`.",
    "push_to_hub_token": "was removed; set the environment variable HF_TOKEN.",
    "split_batches": "belongs in `accelerator_config: {split_batches: …}`.",
    "dispatch_batches": "belongs in `accelerator_config: {dispatch_batches: …}`.",
    # TRL.
    "max_seq_length": "is now called `max_length`.",
    "use_liger": "is now called `use_liger_kernel`.",
    "use_peft": "is not needed; molora always trains an adapter.",
    "dataset_name": "belongs in the list `datasets: [{path: …}]`.",
    "dataset_config": "belongs in the list `datasets: [{path: …, name: …}]`.",
    "dataset_train_split": "belongs in the list `datasets: [{path: …, split: …}]`.",
    "dataset_test_split": "belongs in the list `datasets: [{path: …, eval_split: …}]`.",
    "quantization_config": "is written as TRL's keys, `load_in_4bit: true` or `load_in_8bit: true`.",
    "quantization_bit": "is called `load_in_4bit` or `load_in_8bit`.",
    "bnb_4bit_use_double_quant": "is called `use_bnb_nested_quant`.",
    "bnb_4bit_compute_dtype": "follows `dtype`.",
    # Models.
    "torch_dtype": "is now called `dtype`.",
    "model": "is called `model_name_or_path`.",
    "base_model": "is called `model_name_or_path`.",
    "model_name": "is called `model_name_or_path`.",
    "revision": "is called `model_revision`.",
    "lora_model_dir": "is called `adapter_name_or_path`.",
    # LoRA and its mixtures.
    "lora_r": "is called `r`.",
    "lora_rank": "is called `r`.",
    "rank": "is called `r`.",
    "lora_target_modules": "is called `target_modules`.",
    "lora_target": "is called `target_modules`.",
    "lora_modules_to_save": "is called `modules_to_save`.",
    "init_lora_weights": "is called `init_weights`.",
    "routing_strategy": "is called `selection`.",
    "router_z_loss_coef": "belongs in `routing_losses`; see `molora schema`.",
    "use_dora": "is not supported by molora.",
    # Everyday words.
    "batch_size": "is called `per_device_train_batch_size`.",
    "epochs": "is called `num_train_epochs`.",
    "num_epochs": "is called `num_train_epochs`.",
    "lr": "is called `learning_rate`.",
    "lr_scheduler": "is called `lr_scheduler_type`.",
    "optimizer": "is called `optim`.",
    "dataset": "is a list called `datasets`.",
    "train_file": "belongs in the list `datasets: [{path: …}]`.",
}
"""Top-level keys that no group has. A test keeps this table free of keys that work."""

RENAMED_IN_DATASETS: dict[str, str] = {
    "data_files": "is called `path`.",
    "file": "is called `path`.",
    "dataset_name": "is called `path`.",
    "subset": "is called `name`.",
    "config": "is called `name`.",
    "config_name": "is called `name`.",
    "task_name": "is called `task`.",
    "fraction": "is not supported; use `weight` or `max_samples`.",
    "probability": "is called `weight`.",
    "test_path": "is called `eval_path`.",
    "test_split": "is called `eval_split`.",
    "num_samples": "is called `max_samples`.",
    "max_eval_samples": "is called `eval_max_samples`.",
}

_TOKENISES = "has no effect: molora tokenises the datasets itself"

REFUSED: dict[str, str] = {
    # Read by TRL's own dataset preparation, which molora replaces.
    "dataset_text_field": f"{_TOKENISES}, from the columns of each dataset.",
    "dataset_kwargs": f"{_TOKENISES}.",
    "dataset_num_proc": f"{_TOKENISES}.",
    "chat_template_path": f"{_TOKENISES}, with the chat template of the model's tokenizer.",
    "eos_token": f"{_TOKENISES}, with the end token of the model's tokenizer.",
    "pad_token": f"{_TOKENISES}, with the padding token of the model's tokenizer.",
    "truncation_mode": f"{_TOKENISES} and keeps the start of what is longer than `max_length`.",
    "shuffle_dataset": "has no effect: molora mixes and shuffles the datasets itself; set `seed` or `data_seed`.",
    "packing": f"{_TOKENISES}, one sample to a row.",
    "packing_strategy": f"{_TOKENISES}, one sample to a row.",
    "eval_packing": f"{_TOKENISES}, one sample to a row.",
    "padding_free": f"{_TOKENISES}, one sample to a row.",
    "completion_only_loss": f"{_TOKENISES} and trains on the completion wherever there is a prompt.",
    "assistant_only_loss": f"{_TOKENISES} and trains on the assistant's turns of a conversation.",
    "remove_unused_columns": "has no effect: molora itself makes the columns of a batch.",
    "include_for_metrics": "has no effect: molora scores tasks itself (`evaluate_tasks`).",
    "batch_eval_metrics": "has no effect: molora scores tasks itself (`evaluate_tasks`).",
    # Settled by another key, or by how the run was started.
    "model_init_kwargs": "has no effect: use `model_revision`, `dtype`, `attn_implementation`, `trust_remote_code`.",
    "router_aux_loss_coef": (
        "is the balancing loss of a base model that is itself a mixture of experts; "
        "that of molora's experts is `routing_losses: {load_balancing: 0.001}`."
    ),
    "task_type": "is always CAUSAL_LM in a run file.",
    "do_train": "has no effect: `molora train` trains and `molora plan` does not.",
    "do_eval": "has no effect: set `eval_strategy`.",
    "do_predict": "has no effect: set `evaluate_tasks`.",
    "local_rank": "is set by the launcher.",
    "fsdp": "is set by how the run is started: `accelerate_config: fsdp2`.",
    "fsdp_config": "is set by how the run is started: `accelerate_config: fsdp2`, or a file of `accelerate config`.",
    "deepspeed": "is set by how the run is started: `accelerate_config: zero2` or `zero3`, or a file.",
    "parallelism_config": "cannot be written in a file; use `accelerate config`.",
    "hub_token": "a secret does not belong in a run file; set the environment variable HF_TOKEN.",
}
"""Fields of `SFTConfig` and `MoLoraConfig` that a run file does not take, because there they would do nothing."""
