"""An adapter as data: its config, and its tensors by their names in the file. Nothing here needs the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from molora.adapters import read_adapter_config, read_adapter_tensors
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.folders import WEIGHTS_FILE
from molora.placement import Placement
from molora.plan import ModulePlan, layer_of, plan_module
from molora.quantization import RUN_FILE
from molora.report import REPORT_FILE, known_tasks

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module."""

_BANK = (".molora_A.", ".molora_frozen_A.")
_KEPT_FILES = (
    RUN_FILE,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json"),
)
"""The run file, and what transformers writes for a tokenizer."""
_DEEPEST = 1024
"""The number of layers of a model is looked for up to here."""


@dataclass(frozen=True)
class Adapter:
    """A molora adapter.

    Attributes:
        config: Its choices.
        tensors: Its tensors by their names in the file, as in `docs/checkpoint_format.md`.
    """

    config: MoLoraConfig
    tensors: Mapping[str, Tensor]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Full names of the adapted modules in the base model."""
        named = (key for key in self.tensors if any(part in key for part in _BANK))
        return tuple(dict.fromkeys(key.partition(".molora_")[0].removeprefix(PREFIX) for key in named))

    @cached_property
    def placement(self) -> Placement:
        """Which modules get a plain LoRA, and which route together."""
        return Placement(self.config, None, None)

    @cached_property
    def num_layers(self) -> int | None:
        """Layers of the base model, if the number of experts goes with depth; the fewest that explain the tensors."""
        if isinstance(self.config.num_experts, int):
            return None
        least = 1 + max((layer for name in self.modules if (layer := layer_of(name)) is not None), default=0)
        return next((layers for layers in range(least, _DEEPEST) if self._explains(layers)), least)

    def plan(self, module: str) -> ModulePlan:
        """What of the config concerns a module."""
        return plan_module(self.config, module, self.num_layers, self.placement.is_plain(module))

    def tensor(self, module: str, name: str) -> Tensor | None:
        """A tensor of a module, such as `molora_A.weight`."""
        return self.tensors.get(f"{PREFIX}{module}.{name}")

    def part(self, module: str, container: str) -> dict[str, Tensor]:
        """What a module holds in a container, such as `molora_router`, by the names below it."""
        start = f"{PREFIX}{module}.{container}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    def parameters(self, module: str | None = None) -> int:
        """How many numbers the adapter holds, on one module or on all, routers included."""
        start = PREFIX if module is None else f"{PREFIX}{module}.molora_"
        of_adapter = ((k, v) for k, v in self.tensors.items() if k.startswith(start) and ".molora_" in k)
        return sum(value.numel() for _, value in of_adapter if value.is_floating_point())

    def routing_groups(self) -> dict[str, list[str]]:
        """The modules that share a router, by the one that holds it; a module that routes alone is a group."""
        holders = [name for name in self.modules if self.plan(name).router != "none"]
        groups: dict[int, list[str]] = {}
        for name in holders:
            group = self._group_of(name)
            groups.setdefault(id(name if group is None else group), []).append(name)
        return {
            next((m for m in group if self.part(m, "molora_router")), group[0]): group for group in groups.values()
        }

    def _group_of(self, module: str) -> object | None:
        config, place = self.config, self.placement
        if config.router_input == "base" and config.router_sharing == "none" and config.expert_scope != "ffn":
            return None  # a group of its own
        width = self._width(module)
        # Which size the base model's hidden states have does not matter for who is together.
        place.hidden_size = place.hidden_size or width
        return place.group(module, width)

    def _width(self, module: str) -> int:
        """Size of what a router of a module's own would read."""
        found = next(
            t
            for name in ("molora_A", "molora_frozen_A")
            for t in [self.tensor(module, f"{name}.weight")]
            if t is not None
        )
        return found.shape[1]

    def _explains(self, layers: int) -> bool:
        for module in self.modules:
            plan = plan_module(self.config, module, layers, self.placement.is_plain(module))
            ups = (self.tensor(module, f"{name}.weight") for name in ("molora_B", "molora_frozen_B"))
            if sum(up.shape[1] for up in ups if up is not None) != sum(plan.ranks):
                return False
        return True


def read_adapter(directory: str | Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        ConfigError: If it holds no molora adapter, or a damaged one.
    """
    return Adapter(read_adapter_config(str(directory)), read_adapter_tensors(str(directory)))


def write_adapter(adapter: Adapter, folder: Path, beside: str | Path | None = None) -> None:
    """Write an adapter into an empty folder, where PEFT reads it.

    Args:
        adapter: The adapter.
        folder: The folder.
        beside: An adapter folder whose tokenizer and run file come along, and the names of its tasks.
    """
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}
    save_file(saved, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    adapter.config.save_pretrained(str(folder))
    for path in () if beside is None else _side_files(Path(beside)):
        shutil.copy2(path, folder / path.name)
    tasks = [] if beside is None else known_tasks(str(beside))
    if tasks:  # the scores and the routing beside them are those of the old adapter
        report = {"tasks": tasks, "before": [], "after": [], "routing": []}
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def folder_bytes(adapter: Adapter, beside: str | Path | None = None) -> int:
    """Bytes that `write_adapter` writes, the config aside."""
    own = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    return own + sum(path.stat().st_size for path in (() if beside is None else _side_files(Path(beside))))


def _side_files(folder: Path) -> Iterator[Path]:
    """What a smaller adapter needs too: files that neither hold nor describe the old one."""
    for name in _KEPT_FILES:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            yield path


def disagreement(module: str, what: str) -> MoloraError:
    """The error for tensors that are not what the config says."""
    return MoloraError(f"{module}: {what}, so the adapter's config and weights disagree; is the folder complete?")
