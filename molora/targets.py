"""Target checking: every name in `target_modules` must exist, or training would go on with less than asked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, _maybe_include_all_linear_layers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from molora.config import MoLoraConfig
from molora.errors import TargetModulesError, did_you_mean
from molora.quantization import quantization_backend
from molora.routing.masks import reads_decoder
from molora.routing.routers import reads


class NoMatchingTargetError(TargetModulesError, NoMatchingPeftModuleError):
    """An entry of `target_modules` matches nothing; also the error PEFT itself raises for it."""


_SHORTHANDS = {"all-linear", "dummy-target-modules"}

_ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}
"""Heads PEFT adds to `modules_to_save` by task type, whether or not the model has them."""


def check_targets(config: MoLoraConfig, model: nn.Module) -> None:
    """Refuse targets that match nothing, and let `all-linear` mean quantised linears too.

    Args:
        config: `target_modules` is read; nothing is checked while it is `None` or a shorthand of PEFT's.
        model: The base model.

    Raises:
        TargetModulesError: Naming each entry without a match, the closest name, and the linears the model has.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets in _SHORTHANDS):
        _include_quantised(config, model)
        return
    names = _module_names(model)
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = sorted(target for target in targets if not _ends_in(names, target))
    if targets and not missing:
        return
    linears = sorted(
        {
            name.removesuffix(".base_layer").rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if is_linear(module)
        }
    )
    raise NoMatchingTargetError(
        f"Target modules {missing or sorted(targets)} not found in the base model."
        + "".join(did_you_mean(target.rsplit(".", 1)[-1], linears) for target in missing)
        + f" Its linear layers end in: {', '.join(linears)}. A list names module endings, a string is one regular "
        "expression over full names, and 'all-linear' means all of them."
    )


def _include_quantised(config: MoLoraConfig, model: nn.Module) -> None:
    """Add to `all-linear` the linears that PEFT does not know by their class, as those of GPTQ, AWQ and HQQ."""
    if config.target_modules != "all-linear":
        return
    adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    embeddings: list[Any] = []
    if isinstance(model, PreTrainedModel):
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    found = {
        name
        for name, module in model.named_modules()
        if is_linear(module) and not isinstance(module, nn.Linear | Conv1D) and module not in embeddings
    }
    found = {name for name in found if not name.startswith(adapters)}
    if found:
        _maybe_include_all_linear_layers(config, model)
        config.target_modules = sorted(found.union(config.target_modules))


def check_modules_to_save(config: MoLoraConfig, model: nn.Module) -> None:
    """Refuse names in `modules_to_save` that the model does not have; PEFT itself passes over them.

    Raises:
        TargetModulesError: Naming the first one, and the closest name.
    """
    names = _module_names(model)
    for module in config.modules_to_save or ():
        if module not in _ADDED_BY_PEFT and not _ends_in(names, module):
            endings = {name.rsplit(".", 1)[-1] for name in names}
            raise TargetModulesError(f"{module!r} is no module of the base model.{did_you_mean(module, endings)}")


def _module_names(model: nn.Module) -> list[str]:
    # With an adapter in place already, the linear itself hangs one level deeper.
    return [name.removesuffix(".base_layer") for name, _ in model.named_modules() if name]


def _ends_in(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith("." + target) for name in names)


def adapted_sizes(config: MoLoraConfig, base: nn.Module, key: str, hidden_size: int | None) -> tuple[int, int]:
    """Sizes of the input and output of a module that is to be adapted.

    Raises:
        TargetModulesError: If molora cannot adapt it.
    """
    if config.expert_scope == "block":
        if hidden_size is None:
            raise TargetModulesError("expert_scope='block' needs a model whose config has a hidden_size.")
        return hidden_size, hidden_size
    if not is_linear(base):
        raise TargetModulesError(
            f"target module {key!r} is a {type(base).__name__}, which molora cannot adapt; it adapts "
            "torch.nn.Linear, transformers' Conv1D and quantised linears, and whole blocks with expert_scope='block'. "
            "Leave it out with `exclude_modules`, or train it fully with `modules_to_save`."
        )
    size_in, size_out = _get_in_out_features(base)
    assert size_in is not None
    assert size_out is not None
    for name, size in (("input", size_in), ("output", size_out)):
        for field in ("num_splits", "num_shards"):
            if size % getattr(config, field):
                raise TargetModulesError(
                    f"{field}={getattr(config, field)} does not divide the {name} size {size} of {key!r}; choose "
                    "another number, or leave the module out with `exclude_modules`."
                )
    return size_in, size_out


def check_level(config: MoLoraConfig, model: nn.Module, key: str) -> None:
    """Refuse decisions about whole sequences where a sequence is still being written.

    Raises:
        TargetModulesError: For a module of an encoder-decoder's decoder, or `router_input='base'` on such a model.
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    if config.router_input == "base":
        raise TargetModulesError("router_input='base' needs a model without a separate decoder.")
    if reads(config.router) & {"input", "hidden", "state"} and re.search(r"(^|\.)decoder\.", key):
        crosses = not reads_decoder(key)
        shared = config.router_sharing == "model" or (config.router_sharing == "block" and crosses)
        if shared or config.router == "recurrent":
            field = "router_sharing" if shared else "router"
            raise TargetModulesError(
                f"{field}={getattr(config, field)!r} cannot route {key!r}: encoder and decoder read different tokens. "
                "Adapt one of them, without cross-attention, or choose another."
            )
    if config.router_level == "sequence" and reads_decoder(key):
        raise TargetModulesError(
            f"router_level='sequence' cannot route {key!r}: a decoder's sequence is not known before it is written. "
            r"Adapt the encoder only, with target_modules such as r'encoder\..*\.(q|v)'."
        )


def check_nesting(targets: Iterable[str], blocks: Iterable[str]) -> None:
    """Refuse targets inside a block that another adapter stands around.

    Args:
        targets: Names of the modules to be adapted.
        blocks: Names of the blocks that are.

    Raises:
        TargetModulesError: Naming the first one.
    """
    for block in blocks:
        inside = next((target for target in targets if target.startswith(f"{block}.")), None)
        if inside is not None:
            raise TargetModulesError(
                f"target module {inside!r} lies inside the adapted block {block!r}; adapters in a block and around it "
                "cannot be told apart in a checkpoint. Use separate models."
            )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one that molora adapts as a linear."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    backend = quantization_backend(module)
    # torchao changes weights and not classes, those of embeddings too.
    return backend is not None and backend.layer_type == "linear" and backend.backend_name != "torchao"


def text_config(model: nn.Module) -> Any:
    """The part of a model's config that describes its layers, or `None`."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
