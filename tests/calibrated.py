"""Small adapters whose routers start from data, and the batches they start from."""

from __future__ import annotations

import fast_path
import tiny
import torch
from peft import get_peft_model

from molora import MoLoraConfig
from molora.calibration import calibrate_routers

TOP_2 = {"selection": "top_k", "top_k": 2}
FROM_DATA = {"router_norm": "standardize", "router_init": "clusters", "router_bias": True, **TOP_2}


def batches(rows=12, length=9, seed=1):
    torch.manual_seed(seed)
    ids = torch.randint(4, 94, (rows, length))
    mask = torch.ones_like(ids)
    mask[: rows // 2, : length // 3] = 0
    labels = ids.masked_fill(torch.arange(length) < 2 * length // 3, -100)
    return [
        {"input_ids": i, "attention_mask": m, "labels": t}
        for i, m, t in zip(*(v.split(4) for v in (ids, mask, labels)), strict=True)
    ]


def adapted(calibrated=True, base=None, **fields):
    torch.manual_seed(0)
    config = {
        "r": 2,
        "num_experts": 4,
        "target_modules": fast_path.TARGETS,
        **FROM_DATA,
        **fields,
    }
    config = {name: value for name, value in config.items() if value is not None}
    model = get_peft_model(base or tiny.tiny_llama(), MoLoraConfig(**config))
    if calibrated:
        calibrate_routers(model, batches())
    return model


def routers(model):
    held = {n: m for n, m in model.named_modules() if n.endswith(".molora_router") and len(m)}
    return {name.removesuffix(".molora_router"): modules.default for name, modules in held.items()}
