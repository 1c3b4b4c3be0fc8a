"""Target checking: every name in `target_modules` must exist, or training would go on with less than asked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.config import MoLoraConfig
from molora.errors import TargetModulesError, did_you_mean

_SPECIAL = {"all-linear", "dummy-target-modules"}


def check_targets(config: MoLoraConfig, model: nn.Module) -> None:
    """Refuse targets that match nothing.

    Args:
        config: `target_modules` is read; nothing is checked while it is `None` or a shorthand of PEFT's.
        model: The base model.

    Raises:
        TargetModulesError: Naming each entry without a match, the closest name, and the linears the model has.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets in _SPECIAL):
        return
    names = [_without_wrapper(name) for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        missing = [] if any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = sorted(target for target in targets if not _ends_in(names, target))
    if not missing:
        return
    linears = sorted(
        {
            _without_wrapper(name).rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }
    )
    raise TargetModulesError(
        f"Target modules {missing} not found in the base model."
        + "".join(did_you_mean(target.rsplit(".", 1)[-1], linears) for target in missing)
        + f" Its linear layers end in: {', '.join(linears)}. A list names module endings, a string is one regular "
        "expression over full names, and 'all-linear' means all of them."
    )


def _without_wrapper(name: str) -> str:
    # With an adapter in place already, the linear itself hangs one level deeper.
    return name.removesuffix(".base_layer")


def _ends_in(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith("." + target) for name in names)
