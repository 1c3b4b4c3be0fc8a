"""Import adapters that other programs trained, as molora adapters that compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from safetensors.torch import save_file
from torch import Tensor, nn

from molora.config import MoLoraConfig
from molora.errors import ConfigError, MoloraError, Problem, one_of
from molora.folders import WEIGHTS_FILE
from molora.imported.build import config_from_adapters
from molora.imported.folder import ImportedLora, read_config, read_loras
from molora.imported.foreign_files import base_skeleton, read_foreign_tensors, tensor_bytes, unusable
from molora.imported.mixlora import PREFIX, STRATEGIES, convert_moe
from molora.imported.xlora import in_model_order, read_experts, router_tensors, routing_fields
from molora.loading import check_base
from molora.prototypes import arrow_prototype
from molora.writing import check_place, new_folder

KINDS = ("LORA", "MOLORA", "XLORA", *STRATEGIES)
"""Values of `peft_type` that are imported."""


@dataclass(frozen=True)
class ImportedAdapter:
    """What an import wrote.

    Attributes:
        kind: The `peft_type` it was.
        preset: The preset it is now.
        config: Its config.
        folder: Where it is.
        modules: How many modules are adapted.
        notes: What differs or should be known, a sentence each; empty where there is nothing to say.
    """

    kind: str
    preset: str
    config: MoLoraConfig
    folder: Path
    modules: int
    notes: tuple[str, ...]


def import_adapter(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    base_model: str | None = None,
    preset: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> ImportedAdapter:
    """Write a molora adapter that computes what adapters of another program compute, or refuse.

    | `peft_type` | becomes |
    |---|---|
    | `LORA`, one folder | preset `lora` |
    | `LORA`, several | a mixture of them, preset `arrow` unless another is named |
    | `MIXLORA` (MixLoRA, MoE-PEFT, m-LoRA) | preset `mixlora` or `mixlora-dynamic` |
    | `LORAMOE`, `MOLA` (MoE-PEFT) | preset `loramoe`, `mola` |
    | `XLORA` (PEFT) | preset `x-lora`, deciding token by token |

    Outputs are equal to rounding; of several plain LoRAs each expert is one exactly, and how they are mixed is new.
    What has no exact equivalent is refused, all reasons together.

    Files are read as data: no code in them is run, and no path in them leads out of their folder, with one exception.
    If no `base_model` is given, the `base_model_name_or_path` in the config of a mixture or an X-LoRA is opened as a
    folder, wherever it lies, or asked of the hub. Only the `config.json` there is read.

    Args:
        folders: The adapter's folder, or several of plain LoRAs.
        out: Where to write; must be empty or not exist.
        base_model: Folder or hub id of the base model; default the one the adapter names. Only its config is read. If
            given, all names and sizes are checked against it, those of plain LoRAs too.
        preset: What mixes several plain LoRAs: one whose router follows from them.
        adapters: Folders of an X-LoRA adapter's LoRAs by their names there.

    Raises:
        ConfigError: Listing what cannot be imported exactly, or is damaged. Nothing is written then.
        MoloraError: If the base model is needed and cannot be found.
        WriteError: If something is in the way, or the disk is full.

    Example:
        >>> import molora
        >>> molora.import_adapter("alpaca-mixlora-7b", "adapter", base_model="llama-2-7b").preset  # doctest: +SKIP
        'mixlora'
    """
    given = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    check_place(out)
    if not given:
        raise unusable([Problem("", "no folder given; give at least one.")])
    configs = [read_config(str(folder)) for folder in given]
    kind = _common_kind(configs, given)
    _check_options(kind, len(given), preset, adapters)
    known = _known_fields(configs, base_model)
    if kind in STRATEGIES:
        made = _convert_moe(configs[0], given[0], base_model, known)
    elif kind == "XLORA":
        made = _convert_xlora(configs[0], given[0], adapters, known)
    else:
        made = _convert_loras(given, base_model, preset, known)
    with new_folder(out, tensor_bytes(made.tensors)) as folder:
        save_file(made.tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        made.config.save_pretrained(str(folder))
    modules = len({key.rpartition(".molora_")[0] for key in made.tensors})
    return ImportedAdapter(kind, made.preset, made.config, Path(out), modules, made.notes)


@dataclass(frozen=True)
class _Made:
    """What is to be written."""

    preset: str
    config: MoLoraConfig
    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


def _known_fields(configs: Sequence[Mapping[str, Any]], base_model: str | None) -> dict[str, Any]:
    """Fields that every PEFT config has."""
    known = {"base_model_name_or_path": base_model or _recorded_base(configs), "inference_mode": True}
    task_type = configs[0].get("task_type")
    if configs[0].get("peft_type") in STRATEGIES:
        task_type = task_type or "CAUSAL_LM"  # MoE-PEFT writes none, and trains causal language models
    allowed = [kind.value for kind in TaskType]
    if task_type is not None and task_type not in allowed:
        raise unusable([Problem("task_type", one_of(task_type, allowed))])
    return {**known, "task_type": task_type} if task_type is not None else known


def _common_kind(configs: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> str:
    """The `peft_type` of all folders; `LORA` for several that are plain LoRAs of PEFT and molora."""
    kinds = [str(config.get("peft_type")) for config in configs]
    problems = [
        Problem("peft_type", one_of(kind, KINDS), str(folder))
        for kind, folder in zip(kinds, folders, strict=True)
        if kind not in KINDS
    ]
    if not problems and len(folders) > 1:
        problems = [
            Problem("peft_type", f"got {kind!r}; several folders must all be plain LoRAs, give this one alone.", where)
            for kind, where in zip(kinds, map(str, folders), strict=True)
            if kind not in ("LORA", "MOLORA")
        ]
    if problems:
        raise unusable(problems)
    return kinds[0]


def _check_options(kind: str, number: int, preset: str | None, adapters: Mapping[str, Any] | None) -> None:
    """Refuse options that this kind of adapter does not read."""
    problems = []
    if preset is not None and (number == 1 or kind not in ("LORA", "MOLORA")):
        message = f"got {preset!r}; only several plain LoRAs can be mixed in more than one way. Leave it out."
        problems.append(Problem("preset", message))
    if adapters and kind != "XLORA":
        problems.append(
            Problem("adapters", f"are those of an X-LoRA adapter, and this one is {kind}. Leave them out.")
        )
    if problems:
        raise unusable(problems)


def _recorded_base(configs: Sequence[Mapping[str, Any]]) -> str | None:
    """The base model that all adapters name, if they name one."""
    names = [config.get("base_model_name_or_path") for config in configs]
    name = names[0]
    return name if isinstance(name, str) and name and all(other == name for other in names) else None


def _convert_moe(config: Mapping[str, Any], folder: Path, base_model: str | None, known: dict[str, Any]) -> _Made:
    tensors = read_foreign_tensors(folder)
    base = base_skeleton(base_model) if base_model else _skeleton_if_there(known["base_model_name_or_path"])
    converted = convert_moe(config, tensors, base, str(folder))
    made = MoLoraConfig.from_preset(converted.preset, **known, **converted.fields)
    return _Made(converted.preset, made, converted.tensors, converted.notes)


def _skeleton_if_there(name: str | None) -> nn.Module | None:
    """The base model that an adapter names, or `None`: what needs it then says so."""
    try:
        return base_skeleton(name) if name else None
    except MoloraError:
        return None


def _convert_xlora(
    config: Mapping[str, Any], folder: Path, adapters: Mapping[str, str | Path] | None, known: dict[str, Any]
) -> _Made:
    loras, notes = read_experts(config, folder, adapters)
    fields = routing_fields(config, folder)
    known["base_model_name_or_path"] = known["base_model_name_or_path"] or _recorded_base([x.config for x in loras])
    if not known["base_model_name_or_path"]:
        message = "is not named by the adapter, and the order of its layers is needed; give it (`--base-model`)."
        raise unusable([Problem("base_model", message)])
    base = base_skeleton(known["base_model_name_or_path"])
    check_base(base, loras)
    fields["frozen_experts"] = 0 if config.get("use_trainable_adapters") else len(loras)
    made = config_from_adapters(MoLoraConfig, loras, "x-lora", {**known, **fields})
    modules = in_model_order(loras, base)
    routers = router_tensors(read_foreign_tensors(folder), config, modules, len(loras), str(folder))
    tensors = bank_tensors(loras, frozen=bool(made.frozen_experts))
    tensors |= {PREFIX + name: tensor for name, tensor in routers.items()}
    notes.append(
        "Every token is routed by a pass of the base model, as in PEFT, which leaves no room for a KV cache: generate "
        "with use_cache=False, as `molora generate` and `molora eval` do by themselves."
    )
    if config.get("xlora_depth") == 2 and config.get("xlora_dropout_p", 0.2):
        notes.append("Further training has no dropout inside the classifier.")
    return _Made("x-lora", made, tensors, tuple(notes))


def _convert_loras(
    folders: Sequence[Path], base_model: str | None, preset: str | None, known: dict[str, Any]
) -> _Made:
    loras = read_loras(folders)
    if len(loras) == 1 and _has_gate(loras[0]):
        message = "is a molora adapter with a gate already; use it as it is."
        raise unusable([Problem("", message, str(folders[0]))])
    if base_model:
        check_base(base_skeleton(base_model), loras)
    single = len(loras) == 1
    name = "lora" if single else (preset or "arrow").replace("_", "-")
    # A LoRA alone may be trained further; those of a mixture stay what they are, as `compose` leaves them.
    config = config_from_adapters(MoLoraConfig, loras, name, {**known, **({"frozen_experts": 0} if single else {})})
    tensors = bank_tensors(loras, frozen=bool(config.frozen_experts))
    for module in sorted({module for lora in loras for module in lora.factors}):
        router = _router(config, loras, module)
        if router is not None:
            tensors[f"{PREFIX}{module}.molora_router.weight"] = router
    return _Made(name, config, tensors, ())


def _has_gate(lora: ImportedLora) -> bool:
    of_molora = lora.config.get("peft_type") == "MOLORA"
    return bool(lora.gates) or (of_molora and lora.config.get("router", "linear") != "none")


def bank_tensors(loras: Sequence[ImportedLora], frozen: bool) -> dict[str, Tensor]:
    """The banks of a mixture of LoRAs by their names in the file: A `[R, in]`, B `[out, R]` of each module.

    Args:
        loras: The LoRAs, in the order of the experts.
        frozen: Whether all of them are frozen, or none.
    """
    tensors = {}
    kind = "molora_frozen_" if frozen else "molora_"
    for module in {module for lora in loras for module in lora.factors}:
        pairs = [lora.factors[module] for lora in loras if module in lora.factors]
        tensors[f"{PREFIX}{module}.{kind}A.weight"] = torch.cat([a for a, _, _ in pairs])
        tensors[f"{PREFIX}{module}.{kind}B.weight"] = torch.cat([b for _, b, _ in pairs], dim=1)
    return tensors


def _router(config: MoLoraConfig, loras: Sequence[ImportedLora], module: str) -> Tensor | None:
    """The router `[E, in]` or `[E]` that follows from the LoRAs; `None` if the mixture has none.

    Raises:
        ConfigError: If nothing determines it, so that it has to be trained.
    """
    if config.router == "none":
        return None
    if config.router == "static" and config.freeze_router and config.gate == "softmax":
        return torch.zeros(len(loras))
    rows: list[Tensor | None] = []
    if config.router == "arrow":
        pairs = [lora.factors.get(module) for lora in loras]
        rows = [None if pair is None else arrow_prototype(pair[0], pair[1]).float() for pair in pairs]
    elif config.router == "prototype":
        rows = [lora.gates.get(module) for lora in loras]
    width = next(lora.factors[module][0].shape[1] for lora in loras if module in lora.factors)
    if len(rows) != config.num_experts or all(row is None for row in rows):
        message = (
            "has a router that these LoRAs do not determine; give 'arrow', 'selma', or, with gates, 'phatgoose'. "
            "`molora compose` makes mixtures whose routers are to be trained."
        )
        raise ConfigError([Problem("preset", message)], "cannot be imported exactly")
    return torch.stack([torch.zeros(width) if row is None else row for row in rows])
