"""What routing depends on beyond a layer's own input: tasks, scores, bans, the prompt of the sequence.

These belong to one call of the whole model. A `RoutingScope` is shared by the adapted layers of a model and holds the
inputs of the call that runs; `routing_inputs` fills it. Gradient checkpointing runs layers a second time during the
backward pass, long after the call: the checkpoint functions are bound to their call, so that they see its inputs
again, whatever ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.routing.masks import TokenMasks, prompt_of_labels, token_masks
from molora.routing.route import Routing

SCOPE = "routing_scope"
"""A layer class that has this attribute reads the scope found there."""


@dataclass(frozen=True)
class RoutingInputs:
    """Inputs of one or several calls; see `routing_inputs`."""

    task_ids: Tensor | None = None
    expert_scores: Tensor | None = None
    expert_mask: Tensor | None = None
    expert_weights: Tensor | None = None
    prompt_mask: Tensor | None = None


@dataclass
class RoutingCall:
    """One forward pass of the whole model.

    Attributes:
        inputs: What the caller gave.
        masks: Which tokens are real.
        prompt: `[B, S]`, tokens a sequence-level decision may read; `None` for all real ones.
        decoded: A later step of a generation with cache: the prompt went by before.
        kept: Decisions about the prompt, kept while a sequence is generated; `None` outside generation.
        batch: Rows of the batch, if known.
        shared: Decisions one layer made for others, and the base model's hidden states.
    """

    inputs: RoutingInputs
    masks: TokenMasks = field(default_factory=TokenMasks)
    prompt: Tensor | None = None
    decoded: bool = False
    kept: dict[Any, Any] | None = None
    batch: int | None = None
    shared: dict[Any, Any] = field(default_factory=dict)


class RoutingScope:
    """Where the adapted layers of one model find the call that runs.

    Attributes:
        call: The call, or `None` between calls.
        inputs: Given inputs, while a `routing_inputs` block is open.
        kept: Decisions about prompts, while a generation runs.
        always: Whether some adapter needs to know of every call, not only of those with inputs.
        spans_layers: Whether an adapter hands decisions or states from layer to layer.
        silent: Whether adapters keep out, as while the base model's own hidden states are computed.
    """

    def __init__(self) -> None:
        self.call: RoutingCall | None = None
        self.inputs: RoutingInputs | None = None
        self.kept: dict[Any, Any] | None = None
        self.always = False
        self.silent = False
        self.spans_layers = False
        self._prompt_length: int | None = None
        self._open: list[ExitStack] = []

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: a call begins, unless it is no concern of routing."""
        self._begin(model, args, kwargs, self.always or self.inputs is not None)

    def before_encoder(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of an encoder: a call begins if it runs by itself, as `generate` lets it."""
        self._begin(model, args, kwargs, self.call is None and (self.always or self.inputs is not None))

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], concerns: bool) -> None:
        stack = ExitStack()
        self._open.append(stack)
        if concerns:
            given = kwargs if not args else {"input_ids": args[0], **kwargs}
            stack.enter_context(call_of(self, model, given))

    def after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the whole model, called even if it failed: the call ends."""
        if self._open:
            self._open.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        # A copied model starts outside any call; tensors of a running one cannot be copied.
        return {"always": self.always, "spans_layers": self.spans_layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RoutingScope.__init__(self)
        self.always, self.spans_layers = state["always"], state["spans_layers"]

    def current(self) -> RoutingCall | None:
        """The running call; if the model's own hook did not see it start, one made of the given inputs."""
        if self.call is None and self.inputs is not None:
            return RoutingCall(self.inputs, kept=self.kept)
        return self.call

    @contextmanager
    def running(self, call: RoutingCall | None) -> Iterator[None]:
        """Make `call` the running one inside the block."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    def start(self, model: nn.Module, kwargs: dict[str, Any]) -> RoutingCall:
        """Read the keyword arguments of a forward pass of the whole model."""
        inputs = self.inputs or RoutingInputs()
        encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        masks = token_masks(kwargs, encoder_decoder)
        decoded = _cached_length(kwargs) > 0
        prompt = inputs.prompt_mask
        if prompt is None and kwargs.get("labels") is not None and not encoder_decoder and kwargs["labels"].ndim == 2:
            prompt = prompt_of_labels(kwargs["labels"], masks.of_input)
        if self.kept is not None and prompt is None:
            prompt = self._prompt_while_generating(kwargs)
        return RoutingCall(inputs, masks, prompt, decoded, self.kept, _batch(kwargs))

    def _prompt_while_generating(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The positions of the prompt: those of the first call. Without cache later calls are longer."""
        ids = kwargs.get("input_ids")
        if ids is None or not isinstance(ids, Tensor):
            return None
        if self._prompt_length is None:
            self._prompt_length = ids.shape[1]
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        return real & (torch.arange(ids.shape[1], device=ids.device) < self._prompt_length)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Keep decisions about the prompt for the length of the block."""
        before = self.kept, self._prompt_length
        self.kept, self._prompt_length = {}, None
        try:
            yield
        finally:
            self.kept, self._prompt_length = before


def _batch(kwargs: dict[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    return None


def _cached_length(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0


def scopes(model: nn.Module) -> list[RoutingScope]:
    """The scopes of the adapted layers of a model; one, unless models were put together."""
    found = {id(scope): scope for m in model.modules() if (scope := getattr(m, SCOPE, None)) is not None}
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
        generating: Keep decisions about the prompt while `generate` runs inside the block.

    Raises:
        MoloraError: If the model has no molora layer, or a mask leaves a row without an expert or without a prompt.
    """
    given = RoutingInputs(task_ids, expert_scores, expert_mask, expert_weights, prompt_mask)
    found = scopes(model)
    if not found:
        raise MoloraError("the model has no molora adapter that could be given routing inputs.")
    if expert_mask is not None and not bool(expert_mask.bool().any(dim=-1).all()):
        raise MoloraError("expert_mask bans every expert of a row; leave at least one, or disable the adapter.")
    if prompt_mask is not None and not bool(prompt_mask.bool().any(dim=-1).all()):
        raise MoloraError("prompt_mask marks no token of a row; mark at least one.")
    before = [(scope, scope.inputs) for scope in found]
    for scope in found:
        scope.inputs = _merged(scope.inputs, given)
    try:
        if generating:
            with found[0].generating():
                yield
        else:
            yield
    finally:
        for scope, inputs in before:
            scope.inputs = inputs


def _merged(outer: RoutingInputs | None, given: RoutingInputs) -> RoutingInputs:
    """What is given here wins over an enclosing block."""
    values = {name: value for name, value in vars(given).items() if value is not None}
    return replace(outer or RoutingInputs(), **values)


@contextmanager
def call_of(scope: RoutingScope, model: nn.Module, kwargs: dict[str, Any]) -> Iterator[RoutingCall]:
    """Run one forward pass of the whole model: its call is known to the layers, also when they are recomputed."""
    call = scope.start(model, kwargs)
    recomputes = model.training and torch.is_grad_enabled()
    bound = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)] if recomputes else []
    originals = [(module, vars(module).get("_gradient_checkpointing_func")) for module in bound]
    for module, original in originals:
        if original is not None:
            if scope.spans_layers and getattr(original, "keywords", {}).get("use_reentrant"):
                raise MoloraError(
                    "this adapter hands decisions from layer to layer, and reentrant gradient checkpointing would cut "
                    'their gradient; set gradient_checkpointing_kwargs={"use_reentrant": False}.'
                )
            module._gradient_checkpointing_func = _bind(original, scope, call)  # type: ignore[assignment]
    try:
        with scope.running(call):
            yield call
    finally:
        for module, original in originals:
            if original is not None:
                module._gradient_checkpointing_func = original


def _bind(checkpoint: Callable[..., Any], scope: RoutingScope, call: RoutingCall) -> Callable[..., Any]:
    def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def run(*inner: Any, **options: Any) -> Any:
            with scope.running(call):
                return function(*inner, **options)

        return checkpoint(run, *args, **kwargs)

    return bound


@contextmanager
def continuing_rows(model: nn.Module, owner: Tensor) -> Iterator[None]:
    """Go on with other rows than those whose prompts were read: several continuations of one prompt, say.

    What was decided about each prompt, and the inputs given for it, belong to its continuations inside the block.

    Args:
        model: A model inside a block of `routing_inputs(..., generating=True)`.
        owner: For each new row the index of the prompt it continues, `[C]`.
    """
    before = [(scope, scope.inputs, scope.kept) for scope in scopes(model)]
    for scope, inputs, kept in before:
        if inputs is not None:
            scope.inputs = RoutingInputs(**{name: _rows(value, owner) for name, value in vars(inputs).items()})
        if kept is not None:
            scope.kept = {
                key: value.rows(owner) if isinstance(value, Routing) else value for key, value in kept.items()
            }
    try:
        yield
    finally:
        for scope, inputs, kept in before:
            scope.inputs, scope.kept = inputs, kept


def _rows(value: Tensor | None, owner: Tensor) -> Tensor | None:
    """Rows of an input; one that holds for all rows, or has none, stays."""
    return value if value is None or value.ndim == 0 or len(value) == 1 else value[owner]


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
