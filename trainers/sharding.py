"""Models that are shared out over devices, by FSDP2 or DeepSpeed: what is to stay together, and what changes whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import gather_params_ctx
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from molora.bank import MoLoraLayer
from molora.experts import ShardPool

_OF_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def share_out_by_itself(accelerator: Any, model: Any) -> None:
    """Let FSDP2 make units of what several layers of a model share: pools of shards, and common routers.

    A unit's weights exist only while it runs; else they belong to the layer that holds them, and the others find them
    cut up.

    Args:
        accelerator: The trainer's; nothing happens unless it uses FSDP2.
        model: The adapted model, before it is prepared.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    layers = [module for module in model.modules() if isinstance(module, MoLoraLayer)]
    groups = [group for layer in layers for group in layer.molora_group.values() if len(group.members) > 1]
    shared = {type(router) for group in groups for router in group.leader.molora_router.values()}
    shared |= {ShardPool} if any(layer.molora_pool for layer in layers) else set()
    if shared:
        given = plugin.transformer_cls_names_to_wrap
        names = list(getattr(model, "_no_split_modules", None) or ()) if given is None else given
        plugin.transformer_cls_names_to_wrap = sorted({*names, *(kind.__name__ for kind in shared)})


@torch.no_grad()
def change_whole(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Change a parameter that may be shared out over processes, which all compute the same.

    Args:
        parameter: The parameter, or this process's part of it.
        change: From the whole values to the new ones.
    """
    with gather_params_ctx([parameter]):  # DeepSpeed ZeRO-3
        new = change(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)
        if isinstance(parameter, DTensor):  # every process has it already
            new = distribute_tensor(new, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(new)


def plain_name(name: str) -> str:
    """The name of a module or parameter as it is without what wraps a model that is trained."""
    return _OF_WRAPPERS.sub("", name)


def restore_frozen(model: Any, checkpoint: str) -> None:
    """Take up what is not trained by gradients, as balancing biases, from the adapters in a checkpoint.

    The checkpoints of FSDP and DeepSpeed hold trained parameters only.

    Args:
        model: The adapted model.
        checkpoint: Folder of a checkpoint; adapters other than `default` lie in folders of their names.
    """
    for adapter, saved in saved_adapters(model, checkpoint):
        known = set(saved.keys())
        for name, parameter in model.named_parameters():
            name = plain_name(name)
            key = name.replace(f".{adapter}.", ".")
            if not parameter.requires_grad and key != name and key in known:
                values = saved.get_tensor(key)
                change_whole(parameter, lambda whole, values=values: values.to(whole.device, whole.dtype))


def saved_adapters(model: Any, checkpoint: str) -> Iterator[tuple[str, Any]]:
    """Name and open file of each adapter of a model that a checkpoint holds, `default` in the folder itself."""
    for adapter in model.peft_config:
        file = Path(checkpoint) / ("" if adapter == "default" else adapter) / SAFETENSORS_WEIGHTS_NAME
        if file.is_file():
            with safe_open(file, "pt") as saved:
                yield adapter, saved
