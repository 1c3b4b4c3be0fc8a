"""Put the weights of trained LoRAs into the banks of a model made from them, and the routers that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.config import MoLoraConfig
from molora.errors import ConfigError, MoloraError, Problem
from molora.imported import ImportedLora
from molora.prototypes import arrow_prototype


def check_base(base_model: nn.Module, loras: Sequence[ImportedLora]) -> None:
    """Refuse adapters that were trained on another architecture, before the model is changed.

    Raises:
        ConfigError: Naming, for each adapter, the first module that does not fit.
    """
    modules = dict(base_model.named_modules())
    problems = []
    for lora in loras:
        for name, (a, b, _) in lora.factors.items():
            module = modules.get(name)
            if module is None:
                message = f"changes {name!r}, which the base model does not have."
            else:
                sizes = _get_in_out_features(cast(nn.Module, getattr(module, "base_layer", module)))
                given = (a.shape[1], b.shape[0])
                if sizes in (given, (None, None)):  # what is no linear, the layer itself refuses
                    continue
                message = (
                    f"changes {name!r} from {given[0]} to {given[1]}, in this model it is {sizes[0]} to {sizes[1]}."
                )
            problems.append(Problem("", f"{message} Give the base model it was trained on.", lora.name))
            break
    if problems:
        raise ConfigError(problems, "adapters of another base model")


@torch.no_grad()
def load_experts(model: nn.Module, adapter_name: str, config: MoLoraConfig, loras: Sequence[ImportedLora]) -> None:
    """Copy the adapters into the bank of every adapted linear, in their order, and set the routers they determine.

    Args:
        model: A model whose adapter was made from the config that `config_from_adapters` built from these adapters.
        adapter_name: Name of that adapter.
        config: Its config.
        loras: The adapters; experts beyond them keep their initial values.

    Raises:
        MoloraError: If a module that an adapter changes is not adapted, so that the result would not be exact.
    """
    layers = dict(_adapted(model, adapter_name))
    if any(p.is_meta for layer in layers.values() for p in layer.parameters()):
        return  # only the shapes are asked for, or a checkpoint will bring the values
    missing = sorted({module for lora in loras for module in lora.factors} - layers.keys())
    if missing:
        raise MoloraError(
            f"an adapter changes {missing[0]!r}, which is not adapted in this model, as are {len(missing) - 1} more; "
            "leave out `target_modules` and `exclude_modules`, they follow from the adapters."
        )
    for module, layer in layers.items():
        factors = [lora.factors.get(module) for lora in loras]
        _fill_bank(layer, adapter_name, factors, config.frozen_experts)
        rows = _router_rows(config, loras, module)
        if rows is not None:
            weight = layer.molora_router[adapter_name].weight
            routed = layer.molora_plan[adapter_name].num_experts  # shared experts have no row
            for index, row in enumerate(rows[:routed]):
                weight[index] = 0 if row is None else row.to(weight)


def _adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Yield each linear with this adapter, by its full name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, MoLoraLayer) and module.has_adapter(adapter_name):
            yield name.removeprefix("base_model.model."), module


def _fill_bank(
    layer: Any, adapter_name: str, factors: Sequence[tuple[Tensor, Tensor, float] | None], frozen_experts: int
) -> None:
    """Copy rows of A and columns of B; an expert that lacks this linear has rank 0 and takes no room."""
    for frozen in (False, True):
        part = factors[:frozen_experts] if frozen else factors[frozen_experts:]
        present = [pair for pair in part if pair is not None]
        if not present:
            continue
        prefix = "molora_frozen_" if frozen else "molora_"
        a = torch.cat([pair[0] for pair in present])
        b = torch.cat([pair[1] for pair in present], dim=1)
        getattr(layer, prefix + "A")[adapter_name].weight[: len(a)] = a
        getattr(layer, prefix + "B")[adapter_name].weight[:, : len(a)] = b


def _router_rows(config: MoLoraConfig, loras: Sequence[ImportedLora], module: str) -> list[Tensor | None] | None:
    """Return a router's row for each expert, None for one that lacks this linear; None if nothing determines them."""
    if config.router == "arrow":
        pairs = [lora.factors.get(module) for lora in loras]
        return [None if pair is None else arrow_prototype(pair[0], pair[1]) for pair in pairs]
    gates_are_rows = config.router == "prototype" or (config.router == "linear" and config.num_experts == 1)
    if gates_are_rows and any(lora.gates for lora in loras):
        return [lora.gates.get(module) for lora in loras]
    return None
