"""The call of a whole model that its adapted layers find themselves in.

A `RoutingScope` is shared by the adapted layers of a model and holds the call that runs; `routing_inputs` fills it.
Gradient checkpointing runs layers a second time during the backward pass, long after the call: the checkpoint
functions are bound to their call, so that they see its inputs again, whatever ran in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.routing.masks import TokenMasks, prompt_of_labels, token_masks


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
        kept: Decisions about prompts and the length of these, while a generation runs.
        always: Whether some adapter needs to know of every call, not only of those with inputs.
        spans_layers: Whether an adapter hands decisions or states from layer to layer.
        waiting: What layers of this call computed for others (`molora.siblings.SharedInput`).
        silent: Whether adapters keep out, as while the base model's own hidden states are computed.
    """

    _LASTING: ClassVar[tuple[str, ...]] = ("always", "spans_layers")
    """Attributes that a copy keeps."""

    def __init__(self) -> None:
        self.call: RoutingCall | None = None
        self.inputs: RoutingInputs | None = None
        self.kept: dict[Any, Any] | None = None
        self.always = False
        self.silent = False
        self.spans_layers = False
        self.waiting: set[Any] = set()
        self._open: list[ExitStack] = []
        self._unseen: RoutingCall | None = None

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
        for parts in self.waiting:
            parts.drop()
        self.waiting.clear()
        if self._open:
            self._open.pop().close()

    def __getstate__(self) -> dict[str, Any]:
        # A copied model starts outside any call; tensors of a running one cannot be copied.
        return {name: getattr(self, name) for name in self._LASTING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).__init__(self)
        self.__dict__.update(state)

    def current(self) -> RoutingCall | None:
        """The running call; if the model's own hook did not see it start, that of the given inputs."""
        return self._unseen if self.call is None else self.call

    @contextmanager
    def given(self, inputs: RoutingInputs | None, kept: dict[Any, Any] | None) -> Iterator[None]:
        """Hold inputs, and decisions about prompts, for every call inside the block."""
        before = self.inputs, self.kept, self._unseen
        self.inputs, self.kept = inputs, kept
        self._unseen = None if inputs is None else RoutingCall(inputs, kept=kept)
        try:
            yield
        finally:
            self.inputs, self.kept, self._unseen = before

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
        if prompt is None:
            prompt = self._prompt_while_generating(kwargs)
        return RoutingCall(inputs, masks, prompt, decoded, self.kept, _batch(kwargs))

    def _prompt_while_generating(self, kwargs: dict[str, Any]) -> Tensor | None:
        """The positions of the prompt: those of the first call. Without cache later calls are longer."""
        ids = kwargs.get("input_ids")
        if self.kept is None or not isinstance(ids, Tensor):
            return None
        length = self.kept.setdefault("prompt_length", ids.shape[1])
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -ids.shape[1] :].bool()
        return real & (torch.arange(ids.shape[1], device=ids.device) < length)


def _batch(kwargs: dict[str, Any]) -> int | None:
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids"):
        if isinstance(kwargs.get(name), Tensor):
            return int(kwargs[name].shape[0])
    return None


def _cached_length(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else 0


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
