"""Read trained adapters as experts: plain PEFT LoRA folders, and molora folders that hold a single LoRA.

Either an adapter is exactly `y = W0 x + scale · B A x` at every module it adapts, or it is refused.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.errors import ConfigError, Problem
from molora.folders import CONFIG_FILE, WEIGHTS_FILE, read_adapter_tensors
from molora.imported.describe import expert_at, mistakes_of_values
from molora.imported.refusals import lora_problems, molora_problems, short

_FACTOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_|molora_|molora_frozen_)([AB])\.weight")
_GATE = re.compile(r"base_model\.model\.(.+)\.molora_router\.weight")


@dataclass(frozen=True)
class ImportedLora:
    """One trained LoRA.

    Attributes:
        name: Name of the expert it becomes.
        config: The content of its `adapter_config.json`.
        factors: For each module it adapts, by full name in the base model: A `[r, in]`, B `[out, r]` and the scale.
        gates: For each module the vector `[in]` of its own sigmoid gate (PHATGOOSE); empty for a plain LoRA.
    """

    name: str
    config: dict[str, Any] = field(repr=False)
    factors: dict[str, tuple[Tensor, Tensor, float]] = field(repr=False)
    gates: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def description(self) -> dict[str, Any]:
        """What a molora config keeps of it; see `molora.imported`."""
        return _description(self.name, self.config, sorted(self.factors))


def read_loras(folders: Sequence[str | Path | ImportedLora]) -> list[ImportedLora]:
    """Read adapter folders, each of which becomes one expert named after its folder.

    Args:
        folders: Folders as PEFT saves them. An adapter already read is taken as it is.

    Raises:
        ConfigError: Listing, for every folder, why it cannot be an expert exactly.
    """
    loras: list[ImportedLora] = []
    problems: list[Problem] = []
    for entry, name in zip(folders, _names(folders), strict=True):
        try:
            loras.append(entry if isinstance(entry, ImportedLora) else read_lora(entry, name))
        except ConfigError as error:
            problems += error.problems
    given = [Path(entry).resolve() for entry in folders if not isinstance(entry, ImportedLora)]
    for path in sorted({path for path in given if given.count(path) > 1}):
        problems.append(Problem("", "is given twice; give each adapter once.", str(path)))
    if not folders:
        problems.append(Problem("", "no adapter given; give at least one folder."))
    if problems:
        raise ConfigError(problems, "adapters that cannot become experts")
    return loras


def read_lora(folder: str | Path, name: str | None = None) -> ImportedLora:
    """Read one adapter folder.

    Args:
        folder: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        name: Name of the expert; default the folder's.

    Raises:
        ConfigError: Listing everything that keeps it from being exactly a sum of `B A`.
    """
    where = str(folder)
    config = read_config(where)
    kind = config.get("peft_type")
    if kind not in ("LORA", "MOLORA"):
        message = f"got {kind!r}; only plain LoRA adapters ('LORA') and single molora experts ('MOLORA') are imported."
        raise _unusable([Problem("peft_type", message, where)])
    problems = list((lora_problems if kind == "LORA" else molora_problems)(config, where))
    if problems := [*problems, *_odd_values(config, where)]:
        raise _unusable(problems)
    tensors = _read_tensors(where)
    lora = _assemble(name or Path(where).resolve().name, config, tensors)
    if problems := list(_tensor_problems(lora, tensors, where)):
        raise _unusable(problems)
    return lora


def _assemble(name: str, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> ImportedLora:
    halves: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    gates = {}
    for key, tensor in tensors.items():
        if match := _FACTOR.fullmatch(key):
            halves[match[1]][match[2]] = tensor
        elif match := _GATE.fullmatch(key):
            gates[match[1]] = tensor.reshape(-1)
    complete = {module: pair for module, pair in halves.items() if pair.keys() == {"A", "B"}}
    description = _description(name, config, sorted(complete))
    factors = {module: (pair["A"], pair["B"], expert_at(description, module)[1]) for module, pair in complete.items()}
    return ImportedLora(name, config, factors, gates)


def _odd_values(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """Yield numbers of a config that cannot be, before anything is computed of them."""
    imported = config.get("imported_experts")
    if imported and not (isinstance(imported, list) and len(imported) == 1 and isinstance(imported[0], dict)):
        yield Problem("imported_experts", f"got {short(imported)}; must be a list of one description.", where)
        return
    description = _description("", config, [])
    for key, words in mistakes_of_values(description):
        yield Problem(key, f"got {short(description[key])}; must be {words}.", where)


def _description(name: str, config: Mapping[str, Any], modules: list[str]) -> dict[str, Any]:
    # A molora adapter that was itself made from a LoRA keeps that LoRA's numbers, not its own.
    source = (config.get("imported_experts") or [config])[0]

    def single(value: Any) -> Any:
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    ranks, alphas = source.get("rank_pattern") or {}, source.get("alpha_pattern") or {}
    use_rslora = source.get("use_rslora")
    if isinstance(ranks, dict):
        ranks = {key: single(value) for key, value in ranks.items()}
    return {
        "name": name,
        "r": single(source.get("r", 8)),
        "lora_alpha": source.get("lora_alpha", 8),
        "use_rslora": False if use_rslora is None else use_rslora,
        "rank_pattern": ranks,
        "alpha_pattern": dict(alphas) if isinstance(alphas, dict) else alphas,
        "target_modules": modules,
    }


def _tensor_problems(lora: ImportedLora, tensors: Mapping[str, Tensor], where: str) -> Iterator[Problem]:
    """Yield why the tensors are not what the config says, or more than the factors of linears."""
    known = {key for key in tensors if (match := _FACTOR.fullmatch(key)) and match[1] in lora.factors}
    known |= {key for key in tensors if (match := _GATE.fullmatch(key)) and match[1] in lora.factors}
    others = sorted(tensors.keys() - known)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        hint = "Embeddings, biases, magnitudes and whole modules cannot be mixed; retrain it on linear layers only."
        if any(key.endswith((".base_layer.weight", "embed_tokens.weight", "lm_head.weight")) for key in others):
            hint = "Those are base weights: save it again with `save_pretrained(..., save_embedding_layers=False)`."
        yield Problem(
            WEIGHTS_FILE, f"holds {', '.join(others[:3])}{more}, where only LoRA's A and B may be. {hint}", where
        )
    if not lora.factors:
        yield Problem(WEIGHTS_FILE, "holds no pair of LoRA's A and B; save the adapter with PEFT again.", where)
    description = lora.description
    for module, (a, b, _) in lora.factors.items():
        rank = expert_at(description, module)[0]
        if a.ndim != 2 or b.ndim != 2:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            yield Problem(module, f"has factors of shape {shapes}; only linear layers are adapted.", where)
        elif (a.shape[0], b.shape[1]) != (rank, rank):
            got = f"A of rank {a.shape[0]} and B of rank {b.shape[1]}"
            yield Problem(module, f"has {got}, but {CONFIG_FILE} says {rank}; the folder is damaged.", where)
        gate = lora.gates.get(module)
        if gate is not None and a.ndim == 2 and gate.numel() != a.shape[1]:
            yield Problem(module, f"has a gate of {gate.numel()} numbers for an input of {a.shape[1]}.", where)


def read_config(where: str) -> dict[str, Any]:
    """Read the config of an adapter folder, of any kind.

    Raises:
        ConfigError: If there is no folder, no config, or none that can be read.
    """
    path = Path(where)
    if not path.is_dir():
        message = "is no folder; give one that PEFT's `save_pretrained` wrote, downloaded if it lies on the hub."
        raise _unusable([Problem("", message, where)])
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _unusable([Problem("", f"holds no adapter (no {CONFIG_FILE}).", where)]) from None
    except (OSError, ValueError) as error:
        raise _unusable([Problem(CONFIG_FILE, f"cannot be read ({error}).", where)]) from error
    if not isinstance(config, dict):
        raise _unusable([Problem(CONFIG_FILE, "must hold a JSON object.", where)])
    return config


def _read_tensors(where: str) -> dict[str, Tensor]:
    if not (Path(where) / WEIGHTS_FILE).is_file():
        message = f"has no {WEIGHTS_FILE}; load it with PEFT and save it again, which writes one."
        raise _unusable([Problem("", message, where)])
    return read_adapter_tensors(where)


def _names(folders: Sequence[str | Path | ImportedLora]) -> list[str]:
    """The last folder of each path, or more of the path where that alone is not unique."""
    parts = [
        (entry.name,) if isinstance(entry, ImportedLora) else Path(entry).resolve().parts[1:] for entry in folders
    ]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(path) for path in parts]


def _unusable(problems: Sequence[Problem]) -> ConfigError:
    return ConfigError(problems, "unusable adapter")
