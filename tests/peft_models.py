"""What tests of PEFT's features share: every kind of tiny model, a mixture on it, a batch, and its logits."""

from __future__ import annotations

import tiny
import torch
from peft import get_peft_model

from molora import MoLoraConfig

DECODERS = {"llama": tiny.tiny_llama, "qwen2": tiny.tiny_qwen2, "gpt2": tiny.tiny_gpt2}
MODELS = {**DECODERS, "t5": tiny.tiny_t5, "bert": tiny.tiny_bert_classifier}
PRESETS = ["adamole", "mole", "molora", "static", "lora"]


def adapter(preset="adamole", **overrides):
    fields = {"target_modules": "all-linear", "init_weights": False, **overrides}
    return MoLoraConfig.from_preset(preset, **fields)


def wrap(kind="llama", preset="adamole", **overrides):
    return get_peft_model(MODELS[kind](), adapter(preset, **overrides)).eval()


def batch(kind="llama", rows=3):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 90, (rows, 6), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids[:, :4]} if kind == "t5" else inputs


@torch.no_grad()
def logits(model, kind="llama", **inputs):
    return model(**(inputs or batch(kind))).logits
