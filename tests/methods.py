"""Every preset on a tiny model, small enough for the slow references, with what its routing needs to be given."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import tiny
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig
from transformers import Qwen2MoeForCausalLM as Qwen2Moe

from molora import MoLoraConfig
from molora.bank import MoLoraLayer
from molora.calibration import calibrate_routers, needs_calibration

UNEQUAL = {"num_experts": 4, "r": [2, 3, 1, 4]}
SETTINGS = {
    "recommended": {"num_experts": 4, "r": 2},
    "adamole": {"num_experts": 4, "max_threshold": 0.24},
    "mole": {"num_experts": 4},
    "loramoe": {},
    "mixlora": {"num_experts": 4, "r": 3},
    "mixlora-dynamic": {"num_experts": 4, "r": 3, "top_p": 0.6},
    "mola": {"num_experts": [2, 4], "r": 3},
    "sira": {"num_experts": 6, "r": 2},
    "molora": {"num_experts": 4},
    "hydralora": {},
    "adamoe": {},
    "perft": {"r": 3},
    "pmoe": {"num_experts": 4, "r": 2},
    "smora": {"num_experts": 12, "top_k": 4},
    "flylora": {"num_experts": 12, "top_k": 4},
    "mor1e": {"num_experts": 6},
    "mor1e-pairs": {"num_experts": 6, "r": [2, 3]},
    "mora-cl": {"num_experts": 12, "top_k": 4, "min_logit": 0.1, "temperature": 0.5},
    "aoe": {**UNEQUAL},
    "hmoe": {**UNEQUAL},
    "mos": {"r": 4, "pool_rank": 3, "private_rank": 1, "num_shards": 2},
    "moelora": {"num_experts": 4, "num_tasks": 3, "router_dim": 5},
    "mocle": {"num_experts": 4, "num_tasks": 3, "router_dim": 5},
    "becotta": {"num_experts": 4, "r": [1, 2, 3, 2], "num_tasks": 3},
    "polytropon": {"num_tasks": 3},
    "polytropon-mhr": {"num_tasks": 3, "num_splits": 2},
    "smear": {"num_experts": 4, "r": 3},
    "x-lora": {**UNEQUAL, "router_dim": 7},
    "arrow": {**UNEQUAL},
    "phatgoose": {**UNEQUAL},
    "phatgoose-gate": {"r": 3},
    "glider": {**UNEQUAL},
    "self-moe": {**UNEQUAL},
    "lora-bank": {},
    "lorahub": {"num_experts": 3, "r": 2},
    "psec": {**UNEQUAL},
    "selma": {**UNEQUAL},
    "static": {},
    "lora": {},
}
"""Fields that make each preset small and its choices visible."""

MOE = {**tiny.DECODER, "experts_implementation": "eager"}
"""The fused product of the experts knows no fp64."""

MOE_MODELS = {
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**MOE, num_experts=4, num_experts_per_tok=2)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=4)),
    "qwen2-moe": lambda: Qwen2Moe(
        Qwen2MoeConfig(
            **MOE,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
}


def base_model(preset, kind="llama"):
    """A fresh base model; PERFT needs one with mixtures of experts of its own."""
    if preset == "perft":
        kind = kind if kind in MOE_MODELS else "olmoe"
        torch.manual_seed(0)
        return MOE_MODELS[kind]().eval()
    return {"llama": tiny.tiny_llama, "qwen2": tiny.tiny_qwen2, "gpt2": tiny.tiny_gpt2}[kind]().eval()


def config_of(preset, **overrides):
    """The preset's config with its small settings."""
    fields = {"target_modules": "all-linear", "init_weights": False, "task_type": "CAUSAL_LM"}
    if preset in ("perft", "becotta"):
        fields.pop("target_modules")
    return MoLoraConfig.from_preset(preset, **{**fields, **SETTINGS[preset], **overrides})


def build(preset, kind="llama", seed=7, **overrides):
    """An adapted model in evaluation mode whose every parameter is drawn, so that nothing is zero by chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base_model(preset, kind), config_of(preset, **overrides)).eval()
    generator = torch.Generator().manual_seed(seed)
    banks = ("molora_A", "molora_B", "molora_frozen", "molora_pool")
    for name, parameter in model.named_parameters():
        # SELMA's router is part of the method: equal logits, never trained.
        if "molora_" in name and not any(part in name for part in banks) and preset != "selma":
            std = 0.01 if "molora_blend" in name else 0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    if needs_calibration(model):
        calibrate_routers(model, [{"input_ids": tokens(rows=8, length=9, seed=seed)}])
    return model


def layers_of(model):
    """The adapted modules by name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoLoraLayer)}


def inputs_of(model, rows=3, seed=3):
    """What the model's routing must be given besides tokens."""
    plans = [layer.molora_plan["default"] for layer in layers_of(model).values()]
    reads = frozenset().union(*(plan.reads for plan in plans))
    generator = torch.Generator().manual_seed(seed)
    given = {}
    if "task" in reads:
        given["task_ids"] = torch.arange(rows) % 3
    if "scores" in reads:
        dtype = next(model.parameters()).dtype
        given["expert_scores"] = torch.randn(rows, plans[0].num_experts, generator=generator).to(dtype)
    return given


def tokens(rows=3, length=6, seed=5):
    """Token ids of a batch."""
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def hyper_of(config, plan):
    """The settings a reference reads."""
    fields = {**vars(config), "num_experts": plan.num_experts, "ranks": plan.ranks, "scales": plan.scales}
    return SimpleNamespace(**fields, training=False)


def state_of(layer, adapter="default"):
    """The tensors behind one adapted module by checkpoint name, those it shares with others included."""
    group = layer.molora_group.get(adapter)
    state = {}
    for holder in dict.fromkeys([layer, *([group.leader] if group else [])]):
        for name, value in holder.state_dict().items():
            if name.startswith("molora_") and f".{adapter}." in name:
                state.setdefault(name.replace(f".{adapter}.", "."), value)
    for kind, bank in (("A", layer.molora_A), ("B", layer.molora_B)):
        pool = getattr(bank[adapter], "pool", None) if adapter in bank else None
        if pool is not None:
            state[f"molora_pool.weight_{kind}"] = getattr(pool, f"weight_{kind}").detach()
    return {name: value.double() if value.is_floating_point() else value for name, value in state.items()}


@contextmanager
def watched(model):
    """Note what goes into each adapted module, what its frozen module answers, and what comes out."""
    seen = {name: SimpleNamespace() for name in layers_of(model)}
    handles = []
    for name, layer in layers_of(model).items():

        def note(module, args, output, seen=seen[name]):
            seen.x, seen.y = args[0], output

        def note_base(module, args, output, seen=seen[name]):
            seen.base = output

        handles += [layer.register_forward_hook(note), layer.get_base_layer().register_forward_hook(note_base)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
