"""The tensors of a MixLoRA or MoE-PEFT checkpoint, sorted by the linears they adapt.

| name | |
|---|---|
| `P.layers.{l}.mlp.{linear}.experts.{e}.lora_A.weight`, `lora_B` | an expert's LoRA |
| `P.layers.{l}.self_attn.{linear}.lora_A.weight`, `lora_B` | a LoRA outside the mixture |
| `P.layers.{l}.mlp.moe_gate.weight` | the router of a block (`mixlora`) |
| `P.layers.{l}.{block}.{linear}.moe_gate.weight` | the router of a linear (`loramoe`, `mola`) |

`P` is `mixlora`, `loramoe` or `mola`, which alone has experts in attention too. m-LoRA, their first program, wrote
`mixlora.layers.{l}.gate.weight` and `mixlora.layers.{l}.experts.{e}.{linear}.lora_A.weight`, with `w1_proj`, `w2_proj`
and `w3_proj` for gate, down and up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from molora.errors import Problem
from molora.imported.foreign_files import unusable
from molora.imported.mixlora_config import MoeSettings

FAMILIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    "phi": (("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2")),
    "phi3": (("o_proj", "qkv_proj"), ("gate_up_proj", "down_proj")),
}
"""Linears of attention and of the feed-forward block, in the order of the model; Mistral, Gemma and Qwen2 are like
`llama`. Blocks are called `self_attn` and `mlp`, layers `model.layers.{l}`, in all of them."""

_LORA = re.compile(r"(\w+)\.layers\.(\d{1,6})\.(self_attn|mlp)\.(\w+)(?:\.experts\.(\d{1,6}))?\.lora_([AB])\.weight")
_GATE = re.compile(r"(\w+)\.layers\.(\d{1,6})\.(self_attn|mlp)(?:\.(\w+))?\.moe_gate\.weight")
_OLD_LORA = re.compile(r"mixlora\.layers\.(\d{1,6})\.experts\.(\d{1,6})\.(\w+)\.lora_([AB])\.weight")
_OLD_GATE = re.compile(r"mixlora\.layers\.(\d{1,6})\.gate\.weight")
OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}

Pair = tuple[Tensor, Tensor]


@dataclass
class MoeTensors:
    """A checkpoint's tensors.

    Attributes:
        family: Name in `FAMILIES`.
        layers: Number of layers.
        experts: For each routed linear, by its full name in the base model, A `[r, in]` and B `[out, r]` by expert.
        plain: Likewise for LoRAs outside the mixture.
        gates: Routers `[E, in]`, by the full name of the linear or block that they are in.
    """

    family: str
    layers: int
    experts: dict[str, list[Pair]] = field(default_factory=dict)
    plain: dict[str, Pair] = field(default_factory=dict)
    gates: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ffn(self) -> tuple[str, ...]:
        """Linears of a feed-forward block, in the order of the model."""
        return FAMILIES[self.family][1]


def sort_tensors(tensors: Mapping[str, Tensor], settings: MoeSettings, where: str) -> MoeTensors:
    """Sort a checkpoint's tensors by what they belong to.

    Args:
        tensors: As in the file.
        settings: What its config says.
        where: The folder, for messages.

    Raises:
        ConfigError: Listing what is missing, what is too much, and what has the wrong shape.
    """
    prefix = settings.preset.split("-")[0]
    loras: defaultdict[tuple[int, str, str], dict[tuple[int | None, str], Tensor]] = defaultdict(dict)
    gates: dict[tuple[int, str, str], Tensor] = {}
    unknown = []
    for key, tensor in _renamed(tensors).items():
        if (match := _LORA.fullmatch(key)) and match[1] == prefix:
            expert = None if match[5] is None else int(match[5])
            loras[int(match[2]), match[3], match[4]][expert, match[6]] = tensor
        elif (match := _GATE.fullmatch(key)) and match[1] == prefix:
            gates[int(match[2]), match[3], match[4] or ""] = tensor
        else:
            unknown.append(key)
    problems = [*_unknown(unknown, prefix, where), *_incomplete(loras, gates, settings, where)]
    if problems:
        raise unusable(problems)
    targets = {OLD_NAMES.get(name, name) for name in settings.targets}
    found = {(block, name) for _, block, name in loras}
    family = _family(found)
    layers = 1 + max((layer for layer, _, _ in [*loras, *gates]), default=-1)
    if family is None:
        names = ", ".join(sorted(name for _, name in found)) or "no linear"
        known = "; ".join(", ".join((*attention, *ffn)) for attention, ffn in FAMILIES.values())
        message = f"adapts {names}; known are {known}."
        raise unusable([Problem("", message, where)])
    attention, ffn = FAMILIES[family]
    sorted_tensors = MoeTensors(family, layers)
    for block, linears in (("self_attn", attention), ("mlp", ffn)):
        for name in linears:
            if name not in targets and (block, name) in found:
                problems.append(Problem(name, "has tensors, but target_modules leaves it out.", where))
            elif name in targets:
                problems += _take(sorted_tensors, loras, (block, name), settings, where)
    problems += _take_gates(sorted_tensors, gates, settings, where)
    if not sorted_tensors.experts and not problems:
        problems.append(Problem("", "holds no experts; it is a plain LoRA beside routers of nothing.", where))
    problems += _shape_problems(sorted_tensors, settings, where)
    if problems:
        raise unusable(problems)
    return sorted_tensors


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that are written today."""
    renamed = {}
    for key, tensor in tensors.items():
        if match := _OLD_LORA.fullmatch(key):
            name = OLD_NAMES.get(match[3], match[3])
            key = f"mixlora.layers.{match[1]}.mlp.{name}.experts.{match[2]}.lora_{match[4]}.weight"
        elif match := _OLD_GATE.fullmatch(key):
            key = f"mixlora.layers.{match[1]}.mlp.moe_gate.weight"
        renamed[key] = tensor
    return renamed


def _family(found: set[tuple[str, str]]) -> str | None:
    """The kind of base model whose linears were adapted: the first that fits, so Llama for `down_proj` alone."""
    for family, (attention, ffn) in FAMILIES.items():
        if found and found <= {("self_attn", name) for name in attention} | {("mlp", name) for name in ffn}:
            return family
    return None


def is_ambiguous(tensors: MoeTensors) -> bool:
    """Whether the linears that were adapted leave open which kind of model it is."""
    names = {name.rpartition(".")[2] for name in [*tensors.experts, *tensors.plain]}
    return sum(names <= {*attention, *ffn} for attention, ffn in FAMILIES.values()) > 1


def _unknown(names: list[str], prefix: str, where: str) -> Iterator[Problem]:
    if "classifier" in names:
        yield Problem("classifier", "is a trained classification head, which is no part of a mixture.", where)
        names = [name for name in names if name != "classifier"]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = ", ".join(sorted(names)[:3]) + more
        yield Problem("", f"holds {listed}, which are no tensors of {prefix}.", where)


def _incomplete(
    loras: Mapping[tuple[int, str, str], Mapping[tuple[int | None, str], Tensor]],
    gates: Mapping[tuple[int, str, str], Tensor],
    settings: MoeSettings,
    where: str,
) -> Iterator[Problem]:
    """Yield why numbers in names cannot be counted up to; they are data, and may be anything."""
    layers = {layer for layer, _, _ in [*loras, *gates]}
    if layers and max(layers) >= len(layers):
        missing = next(layer for layer in range(len(layers) + 1) if layer not in layers)
        yield Problem("", f"lacks layer {missing}, of layers up to {max(layers)}; the file is not whole.", where)
    most = max((len(held) // 2 for held in loras.values()), default=0)
    if settings.num_experts > max(most, 1):
        message = f"got {settings.num_experts}, but there are tensors of at most {most} in a linear."
        yield Problem("num_experts", message, where)


def _take(
    into: MoeTensors,
    loras: Mapping[tuple[int, str, str], Mapping[tuple[int | None, str], Tensor]],
    place: tuple[str, str],
    settings: MoeSettings,
    where: str,
) -> Iterator[Problem]:
    """Take the LoRAs of one linear in all layers; yields what is missing or too much."""
    block, name = place
    is_routed = block == "mlp" or settings.preset == "mola"
    wanted: list[int | None] = [*range(settings.num_experts)] if is_routed else [None]
    for layer in range(into.layers):
        held = loras.get((layer, block, name), {})
        keys = [(expert, half) for expert in wanted for half in "AB"]
        module = f"model.layers.{layer}.{block}.{name}"
        missing = [_label(*key) for key in keys if key not in held]
        extra = [_label(*key) for key in held if key not in keys]
        if missing:
            yield Problem(module, f"lacks {_few(missing)}, of {settings.num_experts} experts.", where)
        if extra:
            yield Problem(module, f"has {_few(extra)}, with {settings.num_experts} experts in the config.", where)
        if missing or extra:
            continue
        pairs = [(held[expert, "A"], held[expert, "B"]) for expert in wanted]
        if is_routed:
            into.experts[module] = pairs
        else:
            into.plain[module] = pairs[0]


def _label(expert: int | None, half: str) -> str:
    return f"lora_{half}" if expert is None else f"experts.{expert}.lora_{half}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _take_gates(
    into: MoeTensors, gates: Mapping[tuple[int, str, str], Tensor], settings: MoeSettings, where: str
) -> Iterator[Problem]:
    """Take the routers; yields what is missing or too much."""
    if settings.preset.startswith("mixlora"):
        wanted = {(layer, "mlp", ""): f"model.layers.{layer}.mlp" for layer in range(into.layers)}
    else:
        parts = {module: module.split(".") for module in into.experts}
        wanted = {(int(part[2]), part[3], part[4]): module for module, part in parts.items()}
    for key, module in wanted.items():
        if key in gates:
            into.gates[module] = gates[key]
        else:
            yield Problem(module, "has no router (moe_gate.weight).", where)
    extra = [".".join(str(part) for part in key if part != "") for key in gates.keys() - wanted.keys()]
    if extra:
        yield Problem("moe_gate.weight", f"is there for {_few(sorted(extra))}, which has no experts.", where)


def _shape_problems(tensors: MoeTensors, settings: MoeSettings, where: str) -> Iterator[Problem]:
    """Yield every shape that the config or another layer contradicts."""
    first: dict[str, tuple[int, int]] = {}
    linears = [(module, pairs, settings.expert.r) for module, pairs in tensors.experts.items()]
    linears += [(module, [pair], settings.plain.r) for module, pair in tensors.plain.items()]
    for module, pairs, r in linears:
        name = module.rpartition(".")[2]
        for a, b in pairs:
            if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (r, r):
                message = f"has A {list(a.shape)} and B {list(b.shape)}; rank {r} needs [{r}, in] and [out, {r}]."
                yield Problem(module, message, where)
                break
            size = (a.shape[1], b.shape[0])
            if first.setdefault(name, size) != size:
                expected = " to ".join(map(str, first[name]))
                yield Problem(module, f"maps {size[0]} to {size[1]}, but {expected} elsewhere.", where)
                break
    for module, gate in tensors.gates.items():
        width = (
            block_sizes(tensors)[0] if module.endswith(".mlp") else first.get(module.rpartition(".")[2], (None,))[0]
        )
        if gate.ndim != 2 or gate.shape[0] != settings.num_experts or width not in (None, gate.shape[1]):
            needed = f"[{settings.num_experts}, {width or 'in'}]"
            yield Problem(module, f"has a router of shape {list(gate.shape)}; needed is {needed}.", where)


def block_sizes(tensors: MoeTensors) -> tuple[int | None, int | None]:
    """Size of a feed-forward block's hidden states, and of what its last linear reads, as far as the linears tell."""
    hidden = inner = None
    for module, pairs in tensors.experts.items():
        name, (a, b) = module.rpartition(".")[2], pairs[0]
        if name == tensors.ffn[-1]:
            hidden, inner = b.shape[0], a.shape[-1]
        elif name in tensors.ffn:
            hidden = a.shape[-1]
            inner = b.shape[0] // (2 if name == "gate_up_proj" else 1)
    return hidden, inner
