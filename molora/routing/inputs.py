"""What routing depends on beyond a layer's own input: tasks, scores, bans, the prompt of the sequence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.routing.find import MARK, adapted_modules
from molora.routing.route import Routing
from molora.routing.scope import RoutingInputs, RoutingScope

SCOPE = MARK
"""Attribute of an adapted module in which it finds the scope it reads."""


def scopes(model: nn.Module) -> list[RoutingScope]:
    """The scopes of the adapted layers of a model; one, unless models were put together."""
    found = {id(scope): scope for _, m in adapted_modules(model) if (scope := getattr(m, SCOPE)) is not None}
    return list(found.values())


@contextmanager
def routing_inputs(
    model: nn.Module,
    *,
    task_ids: Tensor | None = None,
    expert_scores: Tensor | None = None,
    expert_mask: Tensor | None = None,
    expert_weights: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    generating: bool = False,
) -> Iterator[None]:
    """Give the adapted layers of a model what their routing needs, for every call inside the block.

    A PEFT model takes the same as keyword arguments of its `forward` and `generate`. Rows that beam search or
    `num_return_sequences` repeat are repeated here too.

    Args:
        model: Any model with molora layers.
        task_ids: Task, cluster or domain of each row, `[B]`.
        expert_scores: Scores that a router of its own would give: `[B, E]` or `[B, S, E]`.
        expert_mask: Boolean `[E]` or `[B, E]`: which experts may be used. At least one per row.
        expert_weights: Mixing weights `[E]` or `[B, E]` that replace what routing would decide.
        prompt_mask: Boolean `[B, S]`: the tokens that decisions about a whole sequence read. Default: the unlabelled
            tokens before the first label, or all real tokens.
        generating: Keep decisions about the prompts while `generate` runs inside the block, one block a batch of them.

    Raises:
        MoloraError: If the model has no molora layer, if something has the wrong shape or type, if there is no such
            task, or if a mask leaves a row without an expert or without a prompt.
    """
    values = (task_ids, expert_scores, expert_mask, expert_weights, prompt_mask)
    given = RoutingInputs(*(None if value is None else torch.as_tensor(value) for value in values))
    found = scopes(model)
    if not found:
        raise MoloraError("the model has no molora adapter that could be given routing inputs.")
    _check(given, model)
    with ExitStack() as block:
        for scope in found:
            block.enter_context(scope.given(_merged(scope.inputs, given), {} if generating else scope.kept))
        yield


def _num_tasks(model: nn.Module) -> int | None:
    """Tasks that the active adapters know, the fewest if they differ; `None` if none of them reads tasks."""
    plans = [
        layer.molora_plan[name]
        for _, layer in adapted_modules(model)
        for name in layer.active_adapters
        if name in layer.molora_plan
    ]
    return min((plan.num_tasks for plan in plans if "task" in plan.reads), default=None)


def _check(given: RoutingInputs, model: nn.Module) -> None:
    """Refuse what would fail deep inside a layer, or be read as something else."""
    ids, scores = given.task_ids, given.expert_scores
    if ids is not None and (ids.ndim != 1 or ids.is_floating_point()):
        raise MoloraError(f"task_ids must be integers [B], one per row; got {ids.dtype} {list(ids.shape)}.")
    # Ids on an accelerator are not looked at: that would make every step wait for the device.
    if ids is not None and ids.device.type == "cpu" and (num_tasks := _num_tasks(model)) is not None:
        wrong = ids[(ids < 0) | (ids >= num_tasks)]
        if wrong.numel():
            raise MoloraError(
                f"task_ids holds {int(wrong[0])}; this adapter knows 0 to {num_tasks - 1} (`num_tasks`)."
            )
    if scores is not None and scores.ndim not in (2, 3):
        raise MoloraError(f"expert_scores must be [B, E] or [B, S, E]; got {list(scores.shape)}.")
    if given.expert_mask is not None and not bool(given.expert_mask.bool().any(dim=-1).all()):
        raise MoloraError("expert_mask bans every expert of a row; leave at least one, or disable the adapter.")
    if given.prompt_mask is not None and not bool(given.prompt_mask.bool().any(dim=-1).all()):
        raise MoloraError("prompt_mask marks no token of a row; mark at least one.")


def _merged(outer: RoutingInputs | None, given: RoutingInputs) -> RoutingInputs:
    """What is given here wins over an enclosing block."""
    values = {name: value for name, value in vars(given).items() if value is not None}
    return replace(outer or RoutingInputs(), **values)


@contextmanager
def continuing_rows(model: nn.Module, owner: Tensor) -> Iterator[None]:
    """Go on with other rows than those whose prompts were read: several continuations of one prompt, say.

    What was decided about each prompt, and the inputs given for it, belong to its continuations inside the block.

    Args:
        model: A model inside a block of `routing_inputs(..., generating=True)`.
        owner: For each new row the index of the prompt it continues, `[C]`.
    """
    with ExitStack() as block:
        for scope in scopes(model):
            inputs, kept = scope.inputs, scope.kept
            if inputs is not None:
                inputs = RoutingInputs(**{name: _rows(name, value, owner) for name, value in vars(inputs).items()})
            if kept is not None:
                kept = {key: value.rows(owner) if isinstance(value, Routing) else value for key, value in kept.items()}
            block.enter_context(scope.given(inputs, kept))
        yield


def _rows(name: str, value: Tensor | None, owner: Tensor) -> Tensor | None:
    """Rows of an input; one that holds for all rows stays."""
    of_all = value is None or len(value) == 1 or (value.ndim == 1 and name != "task_ids")
    return value if of_all or value is None else value[owner]


def rows_of(values: Tensor, batch: int, generating: bool, name: str) -> Tensor:
    """Match per-row inputs to a batch: beams repeat rows while generating.

    Args:
        values: `[B, ...]`; a single row holds for the whole batch.
        batch: Rows of the layer's input.
        generating: Whether repeated rows are those of a beam search.
        name: What the values are called, for the error.

    Raises:
        MoloraError: If the numbers do not fit.
    """
    if len(values) in (1, batch):
        return values.expand(batch, *values.shape[1:])
    if generating and len(values) and batch % len(values) == 0:
        return values.repeat_interleave(batch // len(values), dim=0)
    raise MoloraError(f"{name} has {len(values)} rows and the batch {batch}; give one per row.")
