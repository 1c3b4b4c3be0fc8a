"""PEFT's X-LoRA: LoRAs mixed for each token by a classifier of the base model's last hidden state.

PEFT runs the model twice: once with all LoRAs at `scaling_pass_value`, to give the classifier `h`, and once with
`y = W0 x + g Σ_e w_e s_e B_e A_e x`, `w = softmax(classifier(h) / T)` of the same token. With a scaling pass at 0 that
is `router_input: base` and `router_level: token`, exactly. The fields of `adapter_config.json`:

| field | in molora |
|---|---|
| `xlora_depth` 1 | `router: linear` with `router_bias` |
| `xlora_depth` 2, `xlora_size` | `router: mlp` with `router_dim`; deeper ones are refused |
| `layerwise_scalings` | one router for the model, or one a module |
| `enable_softmax`, `softmax_temperature` | `gate: softmax` with `temperature`, else `gate: identity` |
| `top_k_lora` | `selection: top_k`, weights as they are |
| `enable_softmax_topk` | `weights: selected_softmax`; refused together with `enable_softmax`, which makes two of it |
| `global_scaling_weight` g | multiplied into every `lora_alpha` |
| `scaling_pass_value` | refused unless 0: the classifier would read the model with its LoRAs |
| `xlora_dropout_p` | left out: the classifier is trained without dropout here |
| `adapters` | the experts |
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError, Problem, did_you_mean
from molora.folders import CONFIG_FILE, WEIGHTS_FILE
from molora.imported.describe import expert_at
from molora.imported.folder import ImportedLora, read_lora
from molora.imported.foreign_files import unusable
from molora.imported.refusals import short

_LAYER = re.compile(r"(?:.*\.)?internal_xlora_classifier\.layers\.(\d{1,6})\.(weight|bias)")

EXPLICIT = "Give every LoRA by its folder: `adapters={NAME: DIR}`, or `--adapter NAME=DIR` for each."


def read_experts(
    config: Mapping[str, Any], folder: Path, given: Mapping[str, str | Path] | None
) -> tuple[list[ImportedLora], list[str]]:
    """Read the LoRAs of an X-LoRA adapter, in the order of the classifier's outputs.

    Args:
        config: The content of its `adapter_config.json`.
        folder: Its folder.
        given: Folders of the LoRAs by their names, which win over the config; given all, their order counts too.

    Returns:
        The LoRAs, and what to know about them.

    Raises:
        ConfigError: If one is missing, is no plain LoRA, or the config asks for one outside the folder.
    """
    _check(config, folder)
    listed, given = config["adapters"], given or {}
    problems = [
        Problem(
            "adapters", f"no adapter is called {name!r}; there are {', '.join(listed)}.{did_you_mean(name, listed)}"
        )
        for name in given
        if name not in listed
    ]
    names, notes = _order(listed, given)
    loras = []
    for name in names:
        try:
            loras.append(read_lora(given[name] if name in given else _inside(name, listed[name], folder), name))
        except ConfigError as error:
            problems += error.problems
            if name not in given:
                problems.append(
                    Problem("adapters", f"{name!r} was looked for in this folder. {EXPLICIT}", str(folder))
                )
    if problems:
        raise unusable(problems)
    weight = float(config.get("global_scaling_weight", 1.0))
    if config.get("use_trainable_adapters"):
        notes.append("use_trainable_adapters: the LoRAs must be those after this training, not those it began with.")
    return [_scaled(lora, weight) for lora in loras], notes


def routing_fields(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the classifier computes, as fields of molora's config over those of the preset `x-lora`.

    Raises:
        ConfigError: Listing every field without an exact equivalent.
    """
    _check(config, folder)
    is_deep = config.get("xlora_depth", 1) == 2
    top_k, of_chosen = config.get("top_k_lora"), bool(config.get("enable_softmax_topk", False))
    softmax = bool(config.get("enable_softmax", True))
    fields: dict[str, Any] = {
        "router": "mlp" if is_deep else "linear",
        "router_dim": config.get("xlora_size", 2048) if is_deep else None,
        "router_bias": not is_deep,
        "router_level": "token",
        "router_sharing": "none" if config.get("layerwise_scalings") else "model",
        "gate": "softmax" if softmax or of_chosen else "identity",
        "temperature": float(config.get("softmax_temperature", 1.0)) if softmax else 1.0,
        "weights": "selected_softmax" if of_chosen else "probability",
    }
    if top_k is not None:
        fields |= {"selection": "top_k", "top_k": top_k}
    if fields["gate"] == "softmax" and (len(config["adapters"]) == 1 or (of_chosen and top_k == 1)):
        fields["freeze_router"] = True  # the weight of the only one is 1, whatever the classifier says
    return fields


def router_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], modules: Sequence[str], experts: int, where: str
) -> dict[str, Tensor]:
    """The classifier's parameters as those of molora's routers.

    Args:
        tensors: The tensors of the X-LoRA folder.
        config: Its config.
        modules: All adapted modules in the order of the base model.
        experts: E.
        where: The folder, for messages.

    Returns:
        Tensors by module and name, such as `model.layers.0.self_attn.q_proj.molora_router.weight`.

    Raises:
        ConfigError: If the classifier is not whole, or not of the size its config says.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _LAYER.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    depth = config.get("xlora_depth", 1)
    layers = [found[index] for index in sorted(found)]
    if len(layers) != depth or 0 not in found or any(layer.keys() != {"weight", "bias"} for layer in layers):
        message = (
            f"does not hold all {depth} layers of the classifier. PEFT 0.21 loses those whose number is the name of "
            "an adapter when it saves: take the tensors with 'internal_xlora_classifier' in their names out of the "
            "trained model's `state_dict()`, and save them as this file."
        )
        raise unusable([Problem(WEIGHTS_FILE, message, where)])
    hidden, inner = config.get("hidden_size"), config.get("xlora_size", 2048)
    rows = experts * (len(modules) if config.get("layerwise_scalings") else 1)
    sizes = [(rows, hidden)] if depth == 1 else [(inner, hidden), (rows, inner)]
    for layer, size in zip(layers, sizes, strict=True):
        if layer["weight"].shape != size or layer["bias"].shape != size[:1]:
            message = f"has a classifier layer of {list(layer['weight'].shape)}; {list(size)} is needed here."
            raise unusable([Problem(WEIGHTS_FILE, message, where)])
    names = {"weight": layers[-1]["weight"], "bias": layers[-1]["bias"]}
    shared = {} if depth == 1 else {"weight_in": layers[0]["weight"], "bias_in": layers[0]["bias"]}
    result = {}
    for index, module in enumerate(modules if config.get("layerwise_scalings") else modules[:1]):
        own = {name: tensor[index * experts : (index + 1) * experts] for name, tensor in names.items()}
        for name, tensor in {**own, **shared}.items():
            result[f"{module}.molora_router.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    return result


def in_model_order(loras: Sequence[ImportedLora], base: nn.Module) -> list[str]:
    """All modules that a LoRA adapts, in the order of the base model, which is that of layerwise scalings."""
    adapted = {module for lora in loras for module in lora.factors}
    return [name for name, _ in base.named_modules() if name in adapted]


def _order(listed: Mapping[str, str], given: Mapping[str, str | Path]) -> tuple[list[str], list[str]]:
    """Names in the order of the classifier's outputs, and what to know about it."""
    numbers = [str(index) for index in range(len(listed))]
    if set(listed) == set(given):
        return list(given), []
    if set(listed) == set(numbers):
        return numbers, []
    note = (
        "The adapters are taken in the order of the config, where PEFT sorts them by name; if training had them in "
        "another order, give them all in that order (`adapters`, `--adapter`)."
    )
    return list(listed), [note]


def _inside(name: str, path: str, folder: Path) -> Path:
    """The folder of an adapter that the X-LoRA folder itself holds.

    Raises:
        ConfigError: If it lies elsewhere: a path in a checkpoint is data, and must not choose what is read.
    """
    root = folder.resolve()
    leaves = False
    for inner in (name, path):
        try:
            place = (root / inner).resolve()
            leaves = not place.is_relative_to(root)
            if inner and place != root and not leaves and (place / CONFIG_FILE).is_file():
                return place
        except (OSError, ValueError, RuntimeError):  # too long, with a null character, or a link to itself
            leaves = False
    reason = "lies outside the folder and is not read" if leaves else "is not in the folder"
    raise unusable([Problem("adapters", f"{name!r} is {short(path)}, which {reason}. {EXPLICIT}", str(folder))])


def _scaled(lora: ImportedLora, weight: float) -> ImportedLora:
    """The LoRA with every scale multiplied."""
    if weight == 1:
        return lora
    numbers = lora.description
    numbers["lora_alpha"] *= weight
    numbers["alpha_pattern"] = {key: alpha * weight for key, alpha in numbers["alpha_pattern"].items()}
    config = {**lora.config, "imported_experts": None, **numbers}
    factors = {name: (a, b, expert_at(numbers, name)[1]) for name, (a, b, _) in lora.factors.items()}
    return replace(lora, config=config, factors=factors)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse fields of an X-LoRA, before anything is read or computed by them.

    Raises:
        ConfigError: Listing everything that cannot be read or expressed.
    """
    listed = config.get("adapters")
    if not isinstance(listed, Mapping) or not listed or not all(isinstance(path, str) for path in listed.values()):
        raise unusable([Problem("adapters", f"got {short(listed)}; must map names to folders.", str(folder))])
    if problems := [Problem(field, message, str(folder)) for field, message in _mistakes(config)]:
        raise unusable(problems)


def _mistakes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield field and message of everything that cannot be read or expressed."""
    depth, pass_value = config.get("xlora_depth", 1), config.get("scaling_pass_value", 0.0)
    if depth not in (1, 2):
        yield "xlora_depth", f"got {depth!r}; molora's routers have one layer or two. Train it with a depth of 1 or 2."
    if pass_value != 0:
        yield (
            "scaling_pass_value",
            f"got {pass_value!r}; the classifier then reads the model with its LoRAs on. Only 0 is imported: molora's "
            "router reads the base model.",
        )
    if config.get("enable_softmax", True) and config.get("enable_softmax_topk"):
        yield "enable_softmax_topk", "together with enable_softmax it is a softmax of a softmax; only one is imported."
    top_k, number = config.get("top_k_lora"), len(config["adapters"])
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= number):
        yield "top_k_lora", f"got {top_k!r}; must be a whole number from 1 to the {number} adapters."
    for field, default in (("softmax_temperature", 1.0), ("global_scaling_weight", 1.0)):
        value = config.get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            yield field, f"got {short(value)}; must be a number above 0."
    for field in ("hidden_size", "xlora_size"):
        value = config.get(field, 2048)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield field, f"got {value!r}; must be a whole number of at least 1."
