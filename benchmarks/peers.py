"""Other libraries' mixtures, with their own layer classes; each is left out where its package is not installed.

What was done to run them is said in each method's note, and in `README.md`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.methods import ALPHA, LINEARS, Built, Method, Sizes, base_model

ADAPTER = "default"


def peer_methods(sizes: Sizes) -> tuple[list[Method], dict[str, str]]:
    """The peers that can be built here, and for the others what is missing."""
    k = sizes.top_k
    peers = {
        "": [
            Method("PEFT Poly", "peer", _poly, note="one task; routed per task, not per token; active rank r"),
            Method(
                "PEFT X-LoRA", "peer", _xlora, False, False, "dense, trained experts; no cache; reads the base first"
            ),
        ],
        "mixlora": [
            Method(f"mixlora top-{k}", "peer", _mixlora, False, note="mixture on the FFN; attention has a LoRA r=k*r")
        ],
        "moe_peft": [
            Method(f"moe-peft MoLA top-{k}", "peer", _mola, note="fp32 adapters, as shipped"),
            Method("moe-peft LoRAMoE", "peer", _loramoe, note="dense; fp32 adapters, as shipped"),
        ],
    }
    found, missing = [], {}
    for package, methods in peers.items():
        if package and importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed: pip install --no-deps -r benchmarks/peers.txt"
            missing.update({method.name: reason for method in methods})
        else:
            found.extend(methods)
    return found, missing


def _trained(model: nn.Module) -> list[nn.Parameter | Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _poly(base: nn.Module, sizes: Sizes) -> Built:
    config = PolyConfig(r=sizes.rank, target_modules=LINEARS, n_tasks=1, n_skills=sizes.experts, init_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).to(sizes.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_lora_B" in name:
                parameter.normal_(std=0.01)
    return Built(model.base_model, _trained(model), {"task_ids": torch.zeros(1, dtype=torch.long)})


def _xlora(base: nn.Module, sizes: Sizes) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        lora = LoraConfig(r=sizes.rank, lora_alpha=ALPHA, target_modules=LINEARS, init_lora_weights=False)
        get_peft_model(base_model(sizes), lora, autocast_adapter_dtype=False).save_pretrained(folder)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=sizes.hidden,
            adapters={str(index): folder for index in range(sizes.experts)},
            use_trainable_adapters=True,
        )
        model: Any = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A." in name or "lora_B." in name:  # it freezes experts whenever it runs without adapters
                parameter.requires_grad_()
            if "lora_B." in name:
                parameter.normal_(std=0.01)
    model.to(sizes.dtype)
    return Built(model, _trained(model), cached=False)


def _mixlora(base: nn.Module, sizes: Sizes) -> Built:
    """It has no trainer: experts lie in a dict and the gate is a tensor, so parameters are collected by hand."""
    package, model_module = importlib.import_module("mixlora"), importlib.import_module("mixlora.model")
    configs = {}
    for part, rank in (("attention", sizes.active_rank), ("experts", sizes.rank)):
        configs[part] = package.MixLoraConfig.from_config(
            {
                "base_model_name_or_path": "",
                "task_type": "CAUSAL_LM",
                "peft_type": "MIXLORA",
                "r": rank,
                "lora_alpha": ALPHA,
                "lora_dropout": 0.05,
                "target_modules": LINEARS,
                "routing_strategy": "mixlora",
                "num_experts": sizes.experts,
                "top_k": sizes.top_k,
                "act_fn": "silu",
            }
        )
        configs[part].dtype_, configs[part].adapter_name_, configs[part].model_type_ = sizes.dtype, ADAPTER, "llama"
    weights = _mixlora_weights(base, sizes)
    for index, layer in enumerate(base.model.layers):  # type: ignore[union-attr,arg-type]
        model_module._inject_attn_module(index, layer.self_attn, configs["attention"], weights)
        model_module._inject_mlp_module(index, layer.mlp, configs["experts"], weights)
    trained: list[nn.Parameter | Tensor] = []
    for layer in base.model.layers:  # type: ignore[union-attr]
        mixture = layer.mlp.mixlora_moes[ADAPTER]
        mixture.gate_.requires_grad_()
        trained.append(mixture.gate_)
        for lora in (*layer.self_attn.modules(), *mixture.experts_.values()):
            if isinstance(lora, model_module.LoraLinear):
                lora.dropout_ = nn.Identity()
                trained += [lora.lora_A.weight, lora.lora_B.weight]
    return Built(base, trained)


def _mixlora_weights(base: nn.Module, sizes: Sizes) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}

    def pair(name: str, linear: nn.Linear, rank: int) -> None:
        down, up = linear.in_features, linear.out_features
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, down, dtype=sizes.dtype) / down**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(up, rank, dtype=sizes.dtype) * 0.01

    for index, layer in enumerate(base.model.layers):  # type: ignore[union-attr,arg-type]
        prefix = f"mixlora.layers.{index}"
        for name in LINEARS[:4]:
            pair(f"{prefix}.self_attn.{name}", getattr(layer.self_attn, name), sizes.active_rank)
        for name in LINEARS[4:]:
            for expert in range(sizes.experts):
                pair(f"{prefix}.mlp.{name}.experts.{expert}", getattr(layer.mlp, name), sizes.rank)
        weights[f"{prefix}.mlp.moe_gate.weight"] = torch.randn(sizes.experts, sizes.hidden, dtype=sizes.dtype) * 0.02
    return weights


class MoePeftLinear(nn.Module):
    """Gives a layer of moe-peft the description of the batch that its own model would."""

    def __init__(self, linear: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.linear, self.inputs = linear, inputs

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, in]` to `[B, S, out]`."""
        self.inputs.batch_configs_[0].batch_end_idx_ = len(x)
        return self.linear(x, self.inputs)


def _moe_peft(name: str) -> Any:
    """A module of moe-peft, without its `__init__`, which wants packages for its evaluation."""
    if "moe_peft" not in sys.modules:
        spec = importlib.util.find_spec("moe_peft")
        assert spec is not None
        package = types.ModuleType("moe_peft")
        package.__path__ = list(spec.submodule_search_locations or [])
        package.__spec__ = spec
        sys.modules["moe_peft"] = package
    if name.startswith("moe_peft.adapters") and "moe_peft.adapters" not in sys.modules:
        adapters = types.ModuleType("moe_peft.adapters")
        adapters.__path__ = [str(Path(sys.modules["moe_peft"].__path__[0]) / "adapters")]
        sys.modules["moe_peft.adapters"] = adapters
    return importlib.import_module(name)


def _mola(base: nn.Module, sizes: Sizes) -> Built:
    mola = _moe_peft("moe_peft.adapters.mola")
    fields = {"num_experts": sizes.experts, "top_k": sizes.top_k}
    return _of_moe_peft(base, sizes, mola.MolaConfig, _moe_peft("moe_peft.adapters.mola.model").MolaSparseMoe, fields)


def _loramoe(base: nn.Module, sizes: Sizes) -> Built:
    loramoe = _moe_peft("moe_peft.adapters.loramoe")
    return _of_moe_peft(base, sizes, loramoe.LoraMoeConfig, loramoe.LoraMoe, {"num_experts": sizes.experts})


def _of_moe_peft(base: nn.Module, sizes: Sizes, config_class: Any, block_class: Any, fields: dict[str, Any]) -> Built:
    common = _moe_peft("moe_peft.common")
    lora = {"r": sizes.rank, "lora_alpha": ALPHA, "lora_dropout": 0.05, "target_modules": LINEARS}
    config = config_class.from_config({"name": ADAPTER, **lora, **fields})
    batch = common.LLMBatchConfig(adapter_name_=ADAPTER, batch_start_idx_=0, batch_end_idx_=1)
    inputs = common.LLMModelInput(batch_configs_=[batch])
    trained: list[nn.Parameter | Tensor] = []
    for path, linear in [*base.named_modules()]:
        leaf = path.rpartition(".")[2]
        if leaf not in LINEARS:
            continue
        layer = common.Linear(linear, "cpu")
        for index in range(sizes.experts):
            name = f"moe.{ADAPTER}.experts.{index}"
            layer.init_lora_weight(config, adapter_name=name)
            expert = layer.loras_[name]
            expert.dropout_ = nn.Identity()
            nn.init.normal_(expert.lora_b_.weight, std=0.01)
            trained += [expert.lora_a_.weight, expert.lora_b_.weight]
        block = layer.moes_[ADAPTER] = block_class(layer.in_features_, torch.device("cpu"), config)
        trained += list(block.gate_.parameters())
        setattr(base.get_submodule(path.rpartition(".")[0]), leaf, MoePeftLinear(layer, inputs))
    return Built(base, trained)
