"""Put into an adapter's routers what calibration rows say. Between trainings, never in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.bank import MoLoraLayer
from molora.calibration.features import Features, collect_features
from molora.config import MoLoraConfig
from molora.errors import MoloraError
from molora.plain.moments import Batch
from molora.routing import DATA_INITS, Affine
from molora.routing.start import (
    evening_offsets,
    half_for_answers,
    normalized,
    sharpness,
    statistics,
    text_discriminants,
    token_prototypes,
    winning_offset,
)

ROUNDS = 2
"""Passes in which rows of new experts are made: in the first, modules still read what the old ones answered before."""

OF_NEW_EXPERTS = 0.9
"""Share of the probability that new experts start with on the data they are for."""


def needs_calibration(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether routers of an adapter still wait for the data that they are to start from.

    Args:
        model: The adapted model.
        adapter_name: The adapter.
    """
    return any(
        module.awaits_data
        for layer in _layers(model, adapter_name)
        for container in (layer.molora_router, layer.molora_threshold)
        if adapter_name in container and isinstance(module := container[adapter_name], Affine)
    )


@torch.no_grad()
def calibrate_routers(
    model: nn.Module,
    batches: Sequence[Batch],
    adapter_name: str = "default",
    *,
    experts: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Let an adapter's routers take their statistics, and their rows and balance if the config says so, from data.

    No task labels are used. What is asked for is in the config: `router_norm`, a `router_init` made from data,
    `router_confidence`, and with `router_bias` offsets under which all experts are used evenly. molora's trainers call
    this before the first step; with other trainers call it after `get_peft_model`.

    Args:
        model: The adapted model, the adapter active and not yet trained: B is zero, so that the model is still the
            base model whatever its routers do.
        batches: Some batches of training data, keyword arguments of the model: `input_ids`, `attention_mask`, and
            `labels`, which say which tokens matter.
        adapter_name: The adapter.
        experts: The routed experts to make rows for, such as those that `add_experts` has appended for a new task,
            whose rows then are the batches. All others keep their rows and their offsets, and the statistics stay.
        seed: Of everything that is drawn.
        progress: Show a progress bar if it takes more than two seconds.

    Raises:
        MoloraError: If the adapter has nothing to calibrate, or a router sees no token.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, MoLoraConfig) or config.router_norm == "none":
        raise MoloraError(
            f"adapter {adapter_name!r} has no routers that read statistics of data; set router_norm='standardize'."
        )
    _check_active(model, adapter_name)
    if experts is not None:
        _check_experts(model, adapter_name, config, experts)
    if not batches:
        raise MoloraError("got no calibration batches; give some of the training data.")
    readers = [layer for layer in _layers(model, adapter_name) if adapter_name in layer.molora_router]
    if experts is not None:
        for _ in range(ROUNDS):
            for features, layers in collect_features(model, readers, adapter_name, batches, seed, progress):
                for layer in layers:
                    _add_rows(layer.molora_router[adapter_name], features, config, list(experts), seed)
        return
    for features, layers in collect_features(model, readers, adapter_name, batches, seed, progress):
        mean, std = statistics(features.x)
        z = normalized(features.x, mean, std if config.router_norm == "standardize" else None)
        made: dict[int, tuple[Tensor, Tensor]] = {}  # what is made from the same data need not be made again
        for layer in layers:
            router = layer.molora_router[adapter_name]
            for net in (router, _threshold(layer, adapter_name)):
                if net is not None:
                    net.set_statistics(mean, std)
            number = router.weight.shape[0]
            if number not in made or config.router_init not in DATA_INITS:
                made[number] = _start(config, router, z, features, layer.molora_spec[adapter_name].top_k, seed)
            rows, offsets = made[number]
            router.weight.copy_(rows)
            if router.bias is not None:
                router.bias.copy_(offsets)


def _check_active(model: nn.Module, name: str) -> None:
    """Only an adapter that takes part in forward passes sees data."""
    layers = _layers(model, name)
    active = sorted({active for layer in layers for active in layer.active_adapters})
    if layers and name not in active:
        raise MoloraError(f"adapter {name!r} is not active, {', '.join(active)} is; call model.set_adapter({name!r}).")
    if any(layer.merged or layer.disable_adapters for layer in layers):
        raise MoloraError(f"adapter {name!r} is merged or switched off, so its routers see no data; undo that first.")


def _check_texts(features: Features, experts: int) -> None:
    texts = len(features.row.unique())
    if texts < experts:
        raise MoloraError(
            f"the calibration batches hold {texts} texts, and {experts} experts need as many kinds of them at least; "
            "give more rows (calibration_rows in molora's trainers), or set router_init='directions'."
        )


def _check_experts(model: nn.Module, name: str, config: MoLoraConfig, experts: Sequence[int]) -> None:
    fewest = config.num_experts if isinstance(config.num_experts, int) else min(config.num_experts)
    outside = [index for index in experts if not 0 <= index < fewest]
    if outside or len(set(experts)) != len(experts) or not experts:
        raise MoloraError(f"got experts {list(experts)}; must be different indices from 0 to {fewest - 1}.")
    if len(experts) == fewest:
        raise MoloraError("got all experts; leave `experts` out to calibrate a whole router.")
    if not config.router_bias:
        raise MoloraError("new experts are balanced against the old ones by an offset; set router_bias=True.")
    if needs_calibration(model, name):
        raise MoloraError("the router has seen no data yet; calibrate it whole before experts are added.")


def _add_rows(router: Any, features: Features, config: MoLoraConfig, experts: list[int], seed: int) -> None:
    """Rows and offsets for new experts, so that the data they are for goes to them."""
    z = normalized(features.x, router.input_mean, router.input_std)
    _check_texts(features, len(experts))
    rows, offsets = text_discriminants(
        z, features.row, features.answer, ~features.first, len(experts), seed, torch.zeros_like(z[0])
    )
    others = [index for index in range(router.weight.shape[0]) if index not in experts]
    old = z @ router.weight[others].float().T + router.bias[others].float()
    shift = winning_offset(z @ rows.T + offsets, old, half_for_answers(features.answer), OF_NEW_EXPERTS)
    router.weight[experts] = rows.to(router.weight)
    router.bias[experts] = (offsets + shift).to(router.bias)


def _threshold(layer: Any, name: str) -> Any:
    return layer.molora_threshold[name] if name in layer.molora_threshold else None  # noqa: SIM401  # no dict


def _start(
    config: MoLoraConfig, router: Any, z: Tensor, features: Features, k: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows `[E, in]` and offsets `[E]` of a router, from normalised features `[T, in]`."""
    experts = router.weight.shape[0]
    if config.router_init == "clusters":
        _check_texts(features, experts)
        rows, offsets = text_discriminants(z, features.row, features.answer, ~features.first, experts, seed)
    elif config.router_init == "prototypes":
        rows, offsets = token_prototypes(z, features.answer, experts, seed)
    else:
        rows = router.weight.detach().float()
        offsets = torch.zeros_like(rows[:, 0])
    logits = z @ rows.T + offsets
    if config.router_confidence is not None:
        factor = sharpness(logits / config.temperature, half_for_answers(features.answer), config.router_confidence)
        rows, offsets, logits = rows * factor, offsets * factor, logits * factor
    # Less for answers than in the clustering: they are few, and all tokens are to have even loads too.
    offsets = offsets + evening_offsets(logits, half_for_answers(features.answer, 1 / 3), min(k, experts), seed)
    return rows, offsets


def _layers(model: nn.Module, adapter_name: str) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, MoLoraLayer) and m.has_adapter(adapter_name)]
