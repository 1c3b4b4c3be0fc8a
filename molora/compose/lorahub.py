"""LoraHub: find the weights of a static mixture without gradients, from a few examples.

LoraHub (arXiv 2307.13269; code sail-sg/lorahub): minimise over `w ∈ [-1.5, 1.5]^N`, from 0, in about 40 evaluations,
`loss(examples; w) + 0.05 · mean|w|`. Theirs uses NGOpt of nevergrad, here CMA-ES, which is one small package.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from molora.compose.shots import encode_shots, shot_loss
from molora.data import Example
from molora.errors import MoloraError

BOUND = 1.5
L1 = 0.05
INSTALL_HINT = 'pip install "molora[lorahub]"'


def lorahub(
    model: Any,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    adapter_name: str = "default",
    *,
    steps: int = 40,
    seed: int = 42,
) -> list[float]:
    """Search the weights of a composed static mixture and set them, one vector for all linears.

    Args:
        model: A model from `compose(..., preset="lorahub")`.
        examples: A few examples of the task.
        tokenizer: The model's tokenizer, with a pad token.
        adapter_name: Which adapter of the model.
        steps: Evaluations of all examples, about.
        seed: Of the search.

    Returns:
        The weight of each expert.

    Raises:
        MoloraError: If the adapter has no static router, or the package `cma` is missing.
    """
    routers = static_routers(model, adapter_name)
    shots = encode_shots(examples, tokenizer)
    was_training = model.training
    model.eval()

    def objective(weights: Sequence[float]) -> float:
        _set_weights(routers, weights)
        l1 = sum(map(abs, weights)) / len(weights)
        return shot_loss(model, tokenizer, shots) + L1 * l1

    start = routers[0].weight.detach().clone()
    best = start.tolist()
    try:
        best = search_weights(objective, len(start), steps=steps, seed=seed)
    finally:
        _set_weights(routers, best)
        model.train(was_training)
    return best


def search_weights(
    objective: Callable[[Sequence[float]], float], number: int, *, steps: int = 40, seed: int = 42
) -> list[float]:
    """Minimise a function of `number` weights in `[-1.5, 1.5]` without its gradient, starting at zero.

    Args:
        objective: The function.
        number: N.
        steps: Evaluations, about: the last generation is finished.
        seed: Of the search; numpy's own random state is left as it was.

    Returns:
        The best weights evaluated.

    Raises:
        MoloraError: If the package `cma` is missing.
    """
    cma = _import_cma()
    import numpy as np

    best = [0.0] * number
    least = objective(best)
    state = np.random.get_state()
    try:
        options = {"bounds": [-BOUND, BOUND], "seed": seed, "verbose": -9, "maxfevals": max(steps - 1, 1)}
        strategy = cma.CMAEvolutionStrategy(best, BOUND / 3, options)
        while not strategy.stop():
            candidates = strategy.ask()
            values = [objective(candidate.tolist()) for candidate in candidates]
            strategy.tell(candidates, values)
            if min(values) < least:
                least = min(values)
                best = candidates[values.index(least)].tolist()
    finally:
        np.random.set_state(state)
    return best


def static_routers(model: Any, adapter_name: str) -> list[Any]:
    """Return the static router of each adapted linear.

    Raises:
        MoloraError: If the adapter has none.
    """
    containers = [module.molora_router for module in model.modules() if hasattr(module, "molora_router")]
    routers = [container[adapter_name] for container in containers if adapter_name in container]
    if not routers or any(router.weight.ndim != 1 for router in routers):
        raise MoloraError(
            f"adapter {adapter_name!r} has no static router to set; LoraHub needs one weight an expert: compose it "
            "with preset='lorahub'."
        )
    return routers


@torch.no_grad()
def _set_weights(routers: Sequence[Any], weights: Sequence[float]) -> None:
    for router in routers:
        router.weight.copy_(torch.as_tensor(weights, dtype=router.weight.dtype))


def _import_cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it misses matplotlib, which only its plots need
            import cma
    except ImportError as error:
        raise MoloraError(
            f"LoraHub searches with the package `cma`, which is not installed; {INSTALL_HINT}"
        ) from error
    return cma
