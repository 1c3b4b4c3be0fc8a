"""Where an adapter goes: which modules route together, which get a plain LoRA, which share pools of shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import nn

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.errors import TargetModulesError
from molora.experts import ShardPool
from molora.groups import RoutingGroup
from molora.plan import layer_of
from molora.siblings import SharedInput, input_of
from molora.targets import is_linear


class Placement:
    """What one adapter's modules share, worked out as they are put in place, in the order of the model.

    Args:
        config: The adapter's configuration.
        num_layers: Layers of the model, if known.
        hidden_size: Size of the model's hidden states, if known.
    """

    def __init__(self, config: MoLoraConfig, num_layers: int | None, hidden_size: int | None) -> None:
        self.config = config
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.groups: dict[Any, RoutingGroup] = {}
        self.inputs: dict[Any, SharedInput] = {}
        self.pools: dict[Any, ShardPool] = {}
        self.kinds: dict[Any, list[str]] = defaultdict(list)
        self.previous: MoLoraLayer | None = None

    def expect(self, targets: Iterable[tuple[str, nn.Module]], linears: Iterable[str] = ()) -> None:
        """Look at the modules that will be adapted, before the first one is.

        Args:
            targets: Their names and the modules.
            linears: Names of all linears of the model.

        Raises:
            TargetModulesError: If experts should span feed-forward blocks, and the targets do not.
        """
        blocks: dict[str, list[str]] = defaultdict(list)
        for key, module in targets:
            if self.config.expert_scope == "block" and _holds_adapters(module):
                raise TargetModulesError(
                    f"target block {key!r} has adapted modules inside; adapters in a block and around it cannot be "
                    "told apart in a checkpoint. Use separate models."
                )
            self.kinds[self.kind(key, module)].append(key)
            blocks[self.ffn_block(key) or ""].append(key)
        blocks.pop("", None)
        if self.config.expert_scope != "ffn":
            return
        if not blocks:
            raise TargetModulesError(
                f"expert_scope='ffn' found no target inside a block named {self.config.ffn_modules}; name the "
                "blocks in `ffn_modules` and their linears in `target_modules`."
            )
        for block, keys in blocks.items():
            parts = sorted({key.rpartition(".")[0] for key in keys})
            if len(parts) > 1:
                inner = parts[-1].rpartition(".")[2]
                raise TargetModulesError(
                    f"the block {block} has linears in {' and in '.join(parts)}, which do not follow each other; name "
                    f"the one whose linears an expert shall span in `ffn_modules`, such as [{inner}]."
                )
            left_out = [name for name in linears if name.startswith(f"{block}.") and name not in keys]
            if left_out or len(keys) < 2:
                raise TargetModulesError(
                    f"of the feed-forward block {block} only {', '.join(keys)} are targets; experts that span a block "
                    f"need all of its linears in `target_modules`: {', '.join(left_out)}."
                )

    @staticmethod
    def kind(key: str, module: nn.Module) -> Any:
        """Modules of one kind have the same last name and sizes; they draw from the same pool."""
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        return key.rsplit(".", 1)[-1], *(_get_in_out_features(base) if is_linear(base) else (None, None))

    def position(self, key: str, module: nn.Module) -> tuple[int, int]:
        """Place of a module among those of its kind, and their number."""
        keys = self.kinds[self.kind(key, module)]
        return (keys.index(key), len(keys)) if key in keys else (0, 1)

    def ffn_block(self, key: str) -> str | None:
        """Name of the feed-forward block a module is in, or `None`."""
        parts = key.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if parts[end - 1] in self.config.ffn_modules:
                return ".".join(parts[:end])
        return None

    def is_plain(self, key: str) -> bool:
        """Whether a module gets a plain LoRA beside the mixture of the feed-forward blocks."""
        return self.config.expert_scope == "ffn" and self.ffn_block(key) is None

    def input_of(self, key: str) -> SharedInput:
        """The modules that read the same input as a module."""
        return self.inputs.setdefault(input_of(key), SharedInput())

    def group(self, key: str, feature_size: int) -> RoutingGroup | None:
        """The group a module routes with, or `None` if it routes alone.

        Args:
            key: Full name of the module.
            feature_size: Size of what a router of its own would read.

        Raises:
            TargetModulesError: If the router should read the base model's hidden states, whose size is not known.
        """
        config = self.config
        if self.is_plain(key) or config.router == "none":
            return None
        if config.router_input == "base":
            if self.hidden_size is None:
                raise TargetModulesError("router_input='base' needs a model whose config has a hidden_size.")
            feature_size = self.hidden_size
        if config.expert_scope == "ffn":
            block = self.ffn_block(key)
            return self._group(("ffn", block), f"the feed-forward block {block}", True, feature_size, True)
        if config.router_sharing == "input":
            parent, *names = input_of(key)
            name = ", ".join(f"{parent}.{name}" for name in names) or key
            return self._group(("input", parent, *names), name, True, feature_size)
        if config.router_sharing == "block":
            block = key.rpartition(".")[0]
            return self._group(("block", block), f"the block {block}", True, feature_size)
        if config.router_sharing == "model":
            return self._group("model", "the whole model", True, feature_size)
        if config.router_sharing == "weights":
            return self._group(("weights", feature_size), f"inputs of size {feature_size}", False, feature_size)
        if config.router_input == "base":
            return RoutingGroup(key, True, feature_size)
        return None

    def _group(self, key: Any, name: str, once: bool, feature_size: int, ffn: bool = False) -> RoutingGroup:
        if key not in self.groups:
            self.groups[key] = RoutingGroup(name, once, feature_size, ffn)
        return self.groups[key]


def _holds_adapters(block: nn.Module) -> bool:
    return any(isinstance(inner, MoLoraLayer) for inner in block.modules() if inner is not block)


def restrict_layers(config: MoLoraConfig, num_layers: int | None, everywhere: bool = False) -> None:
    """Turn `depth_range` into the indices of layers that PEFT restricts targets to.

    Args:
        config: Its `layers_to_transform` is set if it has a `depth_range`; `[0.5, 1]` is the deeper half.
        num_layers: Layers of the model, if known.
        everywhere: The targets are full names, as `all-linear` was asked for. PEFT takes those in any layer, so what
            is in others is left out here.

    Raises:
        TargetModulesError: If the number of layers is not known, or `layers_to_transform` says otherwise.
    """
    if config.depth_range is not None:
        _from_depth(config, num_layers)
    if everywhere and config.layers_to_transform is not None and config.target_modules:
        layers = config.layers_to_transform
        kept = {layers} if isinstance(layers, int) else set(layers)
        config.target_modules = {name for name in config.target_modules if layer_of(name) in kept}


def _from_depth(config: MoLoraConfig, num_layers: int | None) -> None:
    assert config.depth_range is not None
    if not num_layers:
        raise TargetModulesError("depth_range needs a model whose config has num_hidden_layers.")
    low, high = config.depth_range
    layers = [layer for layer in range(num_layers) if low * num_layers <= layer < high * num_layers]
    given = config.layers_to_transform
    if given is not None and sorted([given] if isinstance(given, int) else given) != layers:
        raise TargetModulesError(
            f"depth_range={config.depth_range} means layers {layers} of this model, and layers_to_transform says "
            f"{given}; give one of the two."
        )
    config.layers_to_transform = layers
