"""Target checking: every name in `target_modules` must exist, or training would go on with less than asked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import NoMatchingPeftModuleError
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config import MoLoraConfig
from molora.errors import TargetModulesError, did_you_mean


class NoMatchingTargetError(TargetModulesError, NoMatchingPeftModuleError):
    """An entry of `target_modules` matches nothing; also the error PEFT itself raises for it."""


_SHORTHANDS = {"all-linear", "dummy-target-modules"}

_ADDED_BY_PEFT = {"classifier", "score", "qa_outputs"}
"""Heads PEFT adds to `modules_to_save` by task type, whether or not the model has them."""


def check_targets(config: MoLoraConfig, model: nn.Module) -> None:
    """Refuse targets that match nothing.

    Args:
        config: `target_modules` is read; nothing is checked while it is `None` or a shorthand of PEFT's.
        model: The base model.

    Raises:
        TargetModulesError: Naming each entry without a match, the closest name, and the linears the model has.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets in _SHORTHANDS):
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
            if isinstance(module, nn.Linear | Conv1D)
        }
    )
    raise NoMatchingTargetError(
        f"Target modules {missing or sorted(targets)} not found in the base model."
        + "".join(did_you_mean(target.rsplit(".", 1)[-1], linears) for target in missing)
        + f" Its linear layers end in: {', '.join(linears)}. A list names module endings, a string is one regular "
        "expression over full names, and 'all-linear' means all of them."
    )


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
