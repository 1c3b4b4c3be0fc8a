"""MixLoRA, and the LoRAMoE and MoLA of MoE-PEFT: their checkpoints as molora adapters with the same outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from molora.errors import Problem, did_you_mean
from molora.imported.foreign_files import Converted, unusable
from molora.imported.mixlora_config import STRATEGIES, LoraNumbers, MoeSettings, read_settings
from molora.imported.mixlora_tensors import MoeTensors, Pair, block_sizes, is_ambiguous, sort_tensors

PREFIX = "base_model.model."

__all__ = ["STRATEGIES", "convert_moe"]


def convert_moe(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: nn.Module | None, where: str
) -> Converted:
    """Turn a MixLoRA or MoE-PEFT checkpoint into a molora adapter that computes the same.

    Args:
        config: The content of its `adapter_config.json`.
        tensors: Its tensors.
        base: The base model, weights not needed, to check names, sizes and the activation against; `None` if it is
            not at hand.
        where: Its folder, for messages.

    Raises:
        ConfigError: Listing everything that has no exact equivalent or does not fit together.
    """
    settings = read_settings(config, where)
    sorted_tensors = sort_tensors(tensors, settings, where)
    problems = list(_activation_problems(settings, base, where))
    filled = _filled(sorted_tensors, settings)
    if len(filled) > len(sorted_tensors.experts) and is_ambiguous(sorted_tensors) and base is None:
        message = "adapts down_proj alone, which Llama and Phi-3 share; give `base_model` (`--base-model`)."
        problems.append(Problem("target_modules", message, where))
    if base is not None:
        problems += _base_problems({**filled, **_as_lists(sorted_tensors.plain)}, base, sorted_tensors.layers, where)
    if problems:
        raise unusable(problems)
    notes = list(settings.notes)
    if len(filled) > len(sorted_tensors.experts):
        notes.append("Linears of the block without experts got zeros: experts that span a block need all of them.")
    if settings.preset == "loramoe" and sorted_tensors.plain:
        notes.append(
            "The plain LoRAs outside the mixture are now experts that are all alike, whose weights sum to 1: the same "
            "output. Further training would let them differ."
        )
    fields = _fields(settings, filled, sorted_tensors)
    made = _tensors(settings, filled, sorted_tensors)
    return Converted(settings.preset, fields, made, tuple(notes))


def _fields(settings: MoeSettings, experts: Mapping[str, Any], tensors: MoeTensors) -> dict[str, Any]:
    """Fields of the config; ranks and scales outside the block by pattern, where they differ."""
    rslora = settings.expert.use_rslora
    outside = sorted({name.rpartition(".")[2] for name in tensors.plain})
    alpha = settings.plain.alpha_under(rslora)
    fields: dict[str, Any] = {
        **settings.fields,
        "r": settings.expert.r,
        "lora_alpha": settings.expert.lora_alpha,
        "use_rslora": rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in [*experts, *tensors.plain]}),
    }
    if settings.plain.r != settings.expert.r:
        fields["rank_pattern"] = dict.fromkeys(outside, settings.plain.r)
    if alpha != settings.expert.lora_alpha:
        fields["alpha_pattern"] = dict.fromkeys(outside, alpha)
    return fields


def _tensors(settings: MoeSettings, experts: Mapping[str, list[Pair]], tensors: MoeTensors) -> dict[str, Tensor]:
    """The new adapter's tensors by their names in the file."""
    banks = dict(experts)
    routers = dict(tensors.gates)
    if settings.preset.startswith("mixlora"):
        # The first linear of a block holds its router.
        routers = {f"{block}.{tensors.ffn[0]}": gate for block, gate in tensors.gates.items()}
    for module, (a, b) in tensors.plain.items():
        alike = settings.preset == "loramoe"
        banks[module] = [(a, b)] * (settings.num_experts if alike else 1)
        if alike:
            routers[module] = torch.zeros(settings.num_experts, a.shape[1], dtype=a.dtype)
    result = {}
    for module, pairs in banks.items():
        result[f"{PREFIX}{module}.molora_A.weight"] = torch.cat([a for a, _ in pairs])
        result[f"{PREFIX}{module}.molora_B.weight"] = torch.cat([b for _, b in pairs], dim=1)
    for module, gate in routers.items():
        result[f"{PREFIX}{module}.molora_router.weight"] = gate.clone(memory_format=torch.contiguous_format)
    return result


def _filled(tensors: MoeTensors, settings: MoeSettings) -> dict[str, list[Pair]]:
    """The experts, with zeros for the linears of a block that have none, where experts span the block."""
    if not settings.preset.startswith("mixlora"):
        return tensors.experts
    hidden, inner = block_sizes(tensors)
    assert hidden is not None  # there are experts
    assert inner is not None
    filled = {}
    for layer in range(tensors.layers):
        for name in tensors.ffn:
            module = f"model.layers.{layer}.mlp.{name}"
            is_last = name == tensors.ffn[-1]
            size = (inner, hidden) if is_last else (hidden, inner * (2 if name == "gate_up_proj" else 1))
            filled[module] = tensors.experts.get(module) or [_zeros(size, settings.expert)] * settings.num_experts
    return filled


def _zeros(size: tuple[int, int], numbers: LoraNumbers) -> Pair:
    return torch.zeros(numbers.r, size[0]), torch.zeros(size[1], numbers.r)


def _as_lists(plain: Mapping[str, Pair]) -> dict[str, list[Pair]]:
    return {module: [pair] for module, pair in plain.items()}


def _activation_problems(settings: MoeSettings, base: nn.Module | None, where: str) -> Iterator[Problem]:
    """Yield why the experts' activation is not, or not known to be, the base model's."""
    name = settings.act_fn
    if name is None or not settings.preset.startswith("mixlora"):
        return
    if name not in ACT2FN:
        yield Problem(
            "act_fn", f"got {name!r}, which is no activation of transformers.{did_you_mean(name, ACT2FN)}", where
        )
        return
    if base is None:
        message = (
            f"got {name!r}, which is in the experts whatever the base model has; whether that is the same can only be "
            "told with the base model's config. Give `base_model` (`--base-model`)."
        )
        yield Problem("act_fn", message, where)
        return
    own = next((found for block in base.modules() if (found := _activation_of(block)) is not None), None)
    values = torch.linspace(-6, 6, 241)
    if own is None or not torch.allclose(own(values), ACT2FN[name](values), atol=1e-5):
        message = f"got {name!r}, another function than the base model's; molora's experts use the block's own."
        yield Problem("act_fn", message, where)


def _activation_of(module: nn.Module) -> Any:
    """The activation of a feed-forward block, `None` for other modules."""
    if not hasattr(module, "down_proj") and not hasattr(module, "fc2"):
        return None
    return getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)


def _base_problems(linears: Mapping[str, list[Pair]], base: nn.Module, layers: int, where: str) -> Iterator[Problem]:
    """Yield the first linear that the base model lacks or has in another size, and a wrong number of layers."""
    modules = dict(base.named_modules())
    for name, pairs in linears.items():
        module = cast(Any, modules.get(name))
        size = (pairs[0][0].shape[1], pairs[0][1].shape[0])
        own = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if own != size:
            has = "no such linear" if None in own else f"one from {own[0]} to {own[1]}"
            message = f"is adapted from {size[0]} to {size[1]}, and the base model has {has}."
            yield Problem(name, f"{message} Give the base model it was trained on.", where)
            break
    if f"model.layers.{layers}" in modules:
        yield Problem("", f"holds {layers} layers, and the base model has more; the checkpoint is not whole.", where)
