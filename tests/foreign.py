"""Checkpoints of MixLoRA and MoE-PEFT with random tensors, and a slow model that computes what their code does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PHI = ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]
PHI3 = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
CONFIG = {
    "bias": "none",
    "r": 3,
    "lora_alpha": 7,
    "lora_dropout": 0.05,
    "target_modules": LLAMA,
    "num_experts": 4,
    "base_model_name_or_path": "",
}
MIXLORA = {**CONFIG, "peft_type": "MIXLORA", "routing_strategy": "mixlora", "top_k": 2, "task_type": "CAUSAL_LM"}
DYNAMIC = {**CONFIG, "peft_type": "MIXLORA", "routing_strategy": "mixlora-dynamic", "top_p": 0.7, "temperature": 0.0}
LORAMOE = {**CONFIG, "peft_type": "LORAMOE", "routing_strategy": "loramoe"}
MOLA = {**CONFIG, "peft_type": "MOLA", "routing_strategy": "mola", "top_k": 2}


def linears_of(model: Any, names: list[str]) -> list[tuple[int, str, str, Any]]:
    """Layer, block, last name and module of the linears with these names, in the order of the model."""
    return [
        (index, block, name, getattr(getattr(layer, block), name))
        for index, layer in enumerate(model.model.layers)
        for block in ("self_attn", "mlp")
        for name in names
        if hasattr(getattr(layer, block), name)
    ]


def random_tensors(model: Any, config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint with this config, large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    kind, experts = config["peft_type"].lower(), config["num_experts"]
    inner_r = config.get("expert_lora", {}).get("r", config["r"])
    tensors = {}

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * 0.3

    for layer, block, name, linear in linears_of(model, config["target_modules"]):
        place = f"{kind}.layers.{layer}.{block}.{name}"
        routed = block == "mlp" or kind == "mola"
        r = inner_r if routed else config["r"]
        for expert in [f".experts.{e}" for e in range(experts)] if routed else [""]:
            tensors[f"{place}{expert}.lora_A.weight"] = draw(r, linear.in_features)
            tensors[f"{place}{expert}.lora_B.weight"] = draw(linear.out_features, r)
        if routed and kind != "mixlora":
            tensors[f"{place}.moe_gate.weight"] = draw(experts, linear.in_features)
    if kind == "mixlora":
        for layer in range(len(model.model.layers)):
            tensors[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = draw(experts, model.config.hidden_size)
    return tensors


def save_moe(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """As MoE-PEFT saves a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "adapter_model.bin")
    return folder


class Authors:
    """What the authors' code computes, one token and one expert after the other."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.kind = config["peft_type"].lower()

    def delta(self, place: str, x: torch.Tensor, expert: int | None = None) -> torch.Tensor | float:
        """`s B A x`, 0 for what has no LoRA."""
        numbers = self.config if expert is None else self.config | self.config.get("expert_lora", {})
        name = place if expert is None else f"{place}.experts.{expert}"
        if f"{name}.lora_A.weight" not in self.tensors:
            return 0.0
        a, b = (self.tensors[f"{name}.lora_{half}.weight"].to(x) for half in "AB")
        scale = numbers["lora_alpha"] / (math.sqrt(numbers["r"]) if numbers.get("use_rslora") else numbers["r"])
        return scale * (b @ (a @ x))

    def weights(self, gate: str, x: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """The chosen experts of one token and their weights."""
        probabilities = torch.softmax(self.tensors[gate].to(x) @ x, 0)
        order = probabilities.argsort(descending=True).tolist()
        if self.kind == "loramoe":
            return [(e, probabilities[e]) for e in order]
        if self.config["routing_strategy"] == "mixlora-dynamic":
            chosen, total = [], 0.0
            for e in order:
                chosen.append(e)
                total += probabilities[e].item()
                if total > self.config["top_p"]:
                    break
            return [(e, probabilities[e]) for e in chosen]
        chosen = order[: self.config["top_k"]]
        total = sum(probabilities[e] for e in chosen)
        return [(e, probabilities[e] / total) for e in chosen]

    def block(self, mlp: Any, layer: int, x: torch.Tensor) -> torch.Tensor:
        """MixLoRA's block for one token: each expert is the whole block with LoRAs on its linears."""
        place = f"mixlora.layers.{layer}.mlp"
        return sum(w * self.expert(mlp, place, x, e) for e, w in self.weights(f"{place}.moe_gate.weight", x))

    def expert(self, mlp: Any, place: str, x: torch.Tensor, e: int) -> torch.Tensor:
        def adapted(name: str, values: torch.Tensor) -> torch.Tensor:
            return type(mlp.down).forward(mlp.linears[name], values) + self.delta(f"{place}.{name}", values, e)

        if "fc1" in mlp.linears:
            return adapted("fc2", mlp.act(adapted("fc1", x)))
        if "gate_up_proj" in mlp.linears:
            gate, up = adapted("gate_up_proj", x).chunk(2)
            return adapted("down_proj", up * mlp.act(gate))
        return adapted("down_proj", mlp.act(adapted("gate_proj", x)) * adapted("up_proj", x))


def per_token(function: Any, x: torch.Tensor) -> torch.Tensor:
    rows = [function(token) for token in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def authors_model(model: Any, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """Make a base model compute what the authors' code does with a checkpoint; changed in place."""
    authors = Authors(config, tensors)
    for index, block, name, linear in linears_of(model, config["target_modules"]):
        if authors.kind == "mixlora" and block == "mlp":
            continue
        place = f"{authors.kind}.layers.{index}.{block}.{name}"
        routed = f"{place}.moe_gate.weight" in tensors

        def change(x: torch.Tensor, place: str = place, routed: bool = routed) -> torch.Tensor:
            if not routed:
                return authors.delta(place, x)
            return sum(w * authors.delta(place, x, e) for e, w in authors.weights(f"{place}.moe_gate.weight", x))

        def forward(x: torch.Tensor, linear: Any = linear, change: Any = change) -> torch.Tensor:
            return F.linear(x, linear.weight, linear.bias) + per_token(change, x)

        linear.forward = forward
    if authors.kind == "mixlora":
        for index, layer in enumerate(model.model.layers):
            mlp = layer.mlp
            mlp.linears = {name: module for name, module in mlp.named_children() if hasattr(module, "in_features")}
            mlp.down = next(iter(mlp.linears.values()))
            mlp.act = getattr(mlp, "act_fn", None) or mlp.activation_fn
            mlp.forward = lambda x, mlp=mlp, index=index: per_token(lambda token: authors.block(mlp, index, token), x)
    return model
