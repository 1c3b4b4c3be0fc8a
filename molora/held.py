"""Reading what an adapted module holds: quickly, and only where reading is as good as calling."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from molora.experts import BankWeight


def at_hand(module: nn.Module) -> bool:
    """Whether a module's parameters can be read as they are, and nobody waits for the module to be called.

    Not so under FSDP's or DeepSpeed's sharding of the module itself, or with hooks, such as those of offloading.
    """
    held = module.__dict__
    if held["_forward_hooks"] or held["_forward_pre_hooks"] or held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return False
    # Loops written out, here and below: decoding comes by for every linear and token.
    for parameter in held["_parameters"].values():
        if type(parameter) is not nn.Parameter and parameter is not None:
            return False
    return "forward" not in held


def held(layer: nn.Module, container: str, name: str) -> Any:
    """The module that an adapter has in a container, or `None`; without the search behind attributes of modules.

    Args:
        layer: The adapted module.
        container: Name of one of its `ModuleDict`s.
        name: Name of the adapter.
    """
    modules = layer._modules[container]
    assert modules is not None
    return modules._modules.get(name)


def weights_at_hand(layer: nn.Module, containers: tuple[str, ...], name: str) -> list[Tensor] | None:
    """The weights of an adapter's plain matrices in some containers; `None` if one has to be called instead."""
    found: list[Tensor] = []
    for container in containers:
        bank = held(layer, container, name)
        if bank is not None:
            if type(bank) is not BankWeight or not at_hand(bank):
                return None
            found.append(bank.weight)
    return found


def plain_linear(module: nn.Module) -> bool:
    """Whether a frozen linear is nothing but one, so that its product may be computed with others."""
    if type(module) is not nn.Linear or not at_hand(module) or _has_any_global_hook():
        return False
    return not any(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None)
