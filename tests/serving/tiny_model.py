"""A random Llama whose heads can be divided between two processes, and random adapters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from molora import MoLoraConfig
from molora.bank import MoLoraLayer
from molora.writing import new_folder

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
RANDOM: dict[str, dict[str, Any]] = {
    "adamole": {"num_experts": 4, "r": 2, "target_modules": "all-linear"},
    "flylora": {"num_experts": 8, "top_k": 3, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "hydralora": {"num_experts": 3, "target_modules": FEED_FORWARD},
    "recommended": {"num_experts": 4, "r": 2, "target_modules": ["v_proj", "o_proj", "gate_proj", "down_proj"]},
}
"""Mixtures on the random model. All have linears whose input tensor parallelism divides (o_proj, down_proj), and
linears whose output it does; flylora's router reads A's products, adamole's has a threshold."""


def make_tiny(folder: Path, tokenizer: Any) -> None:
    """Write the random Llama and its adapters."""
    save_llama(folder / "base", tokenizer)
    configs: dict[str, Any] = {"lora": LoraConfig(task_type="CAUSAL_LM", **LORA)}
    for name, choices in RANDOM.items():
        configs[name] = MoLoraConfig.from_preset(name, task_type="CAUSAL_LM", **choices)
    for seed, (name, config) in enumerate(configs.items()):
        save_random(folder / "base", folder / "adapters" / name, config, seed)


def save_llama(folder: Path, tokenizer: Any, layers: int = 2) -> None:
    torch.manual_seed(3)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        **ends,
    )
    with new_folder(folder) as new:
        LlamaForCausalLM(config).save_pretrained(new)
        tokenizer.save_pretrained(new)


@torch.no_grad()
def save_random(base: Path, out: Path, config: Any, seed: int) -> None:
    """Write an adapter of which nothing is zero: trained values would not be, either."""
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_B", "molora_B", "molora_router", "molora_threshold")):
            parameter.normal_(std=0.1)
    for module in model.modules():
        if isinstance(module, MoLoraLayer):
            _disturb(module)
    with new_folder(out) as new:
        model.save_pretrained(new)


def _disturb(layer: Any) -> None:
    """Give what is no parameter values as training does: statistics of inputs and balancing biases."""
    for router in layer.molora_router.values():
        if getattr(router, "input_std", None) is not None:
            router.set_statistics(0.3 * torch.randn_like(router.input_mean), 0.5 + torch.rand_like(router.input_std))
    for bias in layer.molora_bias.values():
        for buffer in bias.buffers():
            buffer.normal_(std=0.02)
