"""One streaming pass over calibration data: the second moments that a plain LoRA is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from molora.errors import MoloraError
from molora.heads import last_logits_only
from molora.modes import evaluating
from molora.plain.fit import Moments
from molora.plan import layer_of
from molora.progress import bar
from molora.routing.inputs import routing_inputs, scopes
from molora.routing.masks import TokenMasks, prompt_of_labels, token_masks
from molora.routing.precision import promote
from molora.watch import Seen, watching

Batch = Mapping[str, Any]
PARTS = ("fit", "choose", "judge")
"""What rows are for: to fit to, to choose the ridge by, and to judge the result by."""

_ROUTING = ("task_ids", "expert_scores")
DEFAULT_MEMORY = 4 * 2**30
"""Bytes of moments held at a time; where all linears need more, the data is gone through several times."""


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Mapping[str, Any],
    adapter_name: str,
    batches: Mapping[str, Sequence[Batch]],
    *,
    by_block: bool = False,
    max_memory: int = DEFAULT_MEMORY,
    progress: bool = False,
) -> Iterator[dict[str, dict[str, Moments]]]:
    """Run calibration data through a model and sum up what its adapted linears read and answer.

    Args:
        model: The adapted model; left in the mode it was in.
        layers: Its adapted linears by name, in the order they run.
        adapter_name: The adapter, which must be active.
        batches: For each of `PARTS` its batches, which are keyword arguments of the model: `input_ids`,
            `attention_mask`, perhaps `labels`, `task_ids`, `expert_scores`.
        by_block: A pass for each block of the model, which goes no further than its last adapted linear.
        max_memory: Bytes to hold at a time.
        progress: Show a progress bar.

    Yields:
        Moments of one group of linears after the other, by name and part; each group takes a pass over the data.

    Raises:
        MoloraError: If a linear saw no token in one of the parts.
    """
    groups = list(_groups(layers, len(batches), max_memory, by_block))
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    options |= last_logits_only(model)
    total = len(groups) * sum(map(len, batches.values()))
    with evaluating(model), bar(total, "calibrating", "batch", shown=progress) as shown:
        for group in groups:
            collectors = {}
            for part, own in batches.items():
                collectors[part] = _Collector(group, adapter_name)
                with collectors[part].attached(), _ending_after(group, by_block):
                    for batch in own:
                        with suppress(_Enough):
                            run_batch(model, batch, collectors[part].begin, **options)
                        shown.update()
            yield {name: {part: c.moments(name) for part, c in collectors.items()} for name in group}


def run_batch(
    model: nn.Module, batch: Batch, begin: Callable[[TokenMasks], None] | None = None, **options: Any
) -> Any:
    """Run one batch without its labels, its routing told what they say about the prompt.

    Args:
        model: The model.
        batch: As for `collect`.
        begin: Told which tokens are real, before the pass.
        **options: Further keyword arguments of the model.
    """
    device = next(model.parameters()).device
    given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels = given.pop("labels", None)
    routing: dict[str, Any] = {name: given.pop(name) for name in _ROUTING if name in given}
    like = given.get("attention_mask", given.get("input_ids"))
    if labels is not None and like is not None and labels.shape == like.shape:
        routing["prompt_mask"] = prompt_of_labels(labels, given.get("attention_mask"))
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    if encoder_decoder and labels is not None:
        whole: Any = model
        base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        given["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels)
    if begin is not None:
        begin(token_masks({**given, "labels": labels}, encoder_decoder))
    with routing_inputs(model, **routing) if scopes(model) else nullcontext():
        return model(**given, **options)


class _Enough(Exception):
    """A forward pass has shown what it was run for."""


@contextmanager
def _ending_after(layers: Mapping[str, Any], ends: bool) -> Iterator[None]:
    """Let passes end behind the last of some linears."""
    if not ends:
        yield
        return

    def end(layer: Any, *_: Any) -> None:
        if not layer.routing_scope.silent:  # else the base model's own pass, which a router reads the end of
            raise _Enough

    handle = list(layers.values())[-1].register_forward_hook(end)
    try:
        yield
    finally:
        handle.remove()


def _groups(layers: Mapping[str, Any], parts: int, max_memory: int, by_block: bool) -> Iterator[dict[str, Any]]:
    """Cut the linears into runs whose moments fit; siblings are counted as if each had its own."""
    group: dict[str, Any] = {}
    held, block = 0, None
    for name, layer in layers.items():
        needs = parts * 8 * (layer.in_features + 1) ** 2
        before, block = block, layer_of(name)
        if group and (held + needs > max_memory or (by_block and block != before)):
            yield group
            group, held = {}, 0
        group[name] = layer
        held += needs
    if group:
        yield group


class _Collector:
    """Sums for one part of the data."""

    def __init__(self, layers: Mapping[str, Any], adapter_name: str) -> None:
        self.layers, self.adapter_name = layers, adapter_name
        self.sums: dict[str, Moments] = {}
        self._masks = TokenMasks()
        self._inputs: dict[str, Tensor] = {}
        self._last: tuple[Tensor, str, Tensor] | None = None
        self._owner: dict[str, str] = {}

    def begin(self, masks: TokenMasks) -> None:
        """A forward pass begins."""
        self._masks, self._last = masks, None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watch the linears inside the block."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                if layer.molora_plan[self.adapter_name].after:  # its experts read the output
                    stack.callback(layer.register_forward_pre_hook(self._note_input).remove)
            stack.enter_context(watching(self.layers.values(), self._see))
            yield
            self._last = None
            self._inputs.clear()

    def _note_input(self, layer: Any, args: tuple[Any, ...]) -> None:
        self._inputs[layer.module_key] = args[0]

    def _see(self, layer: Any, name: str, seen: Seen) -> None:
        if name != self.adapter_name:
            return
        key, plan = layer.module_key, layer.molora_plan[name]
        x = self._inputs.pop(key) if plan.after else seen.x
        mask = self._masks.of_layer(layer.routing_name, x.shape[:-1])
        flat, owner = self._read(x, mask, key)
        if not len(flat):
            return
        gated = seen.gated.flatten(-2) if plan.num_splits > 1 else seen.gated
        h = promote(_tokens(gated.expand(*x.shape[:-1], gated.shape[-1]), mask))
        if key not in self.sums:
            self.sums[key] = _empty(h.shape[1], flat.shape[1], seen.weights, plan.num_splits, flat.device)
        own = self.sums[key]
        if owner == key:
            own.xx += (flat.T @ flat).to(own.xx)
        else:
            own.xx = self.sums[owner].xx
        own.hx += (h.T @ flat).to(own.hx)
        own.hh += (h.T @ h).to(own.hh)
        own.count += len(flat)
        if seen.weights is not None and own.weights is not None:
            extra = own.weights.ndim
            weights = seen.weights.expand(*x.shape[:-1], *seen.weights.shape[-extra:])
            own.weights += _tokens(weights.flatten(-extra), mask).sum(0).to(own.weights).view_as(own.weights)

    def _read(self, x: Tensor, mask: Tensor | None, key: str) -> tuple[Tensor, str]:
        """The real tokens with a 1 behind each, `[T, in + 1]`, and the linear that sums up their second moments."""
        if self._last is not None and self._last[0] is x and self._owner.get(key, self._last[1]) == self._last[1]:
            self._owner[key] = self._last[1]
            return self._last[2], self._last[1]
        if self._owner.setdefault(key, key) != key:
            raise MoloraError(f"{key} shares its input with {self._owner[key]} in some calls only.")
        flat = pad(promote(_tokens(x, mask)), (0, 1), value=1.0)
        self._last = (x, key, flat)
        return flat, key

    def moments(self, key: str) -> Moments:
        """What was summed up for one linear."""
        found = self.sums.get(key)
        if found is None or not found.count:
            raise MoloraError(
                f"no calibration token reached {key}; give rows that use it, and at least ten of them, so that there "
                "are some to fit to, to choose by and to judge by."
            )
        return found


def _tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.flatten(0, -2) if mask is None else values[mask.to(values.device)]


def _empty(columns: int, inputs: int, weights: Tensor | None, num_splits: int, device: torch.device) -> Moments:
    where = torch.device("cpu") if device.type == "mps" else device  # which has no fp64

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=where)

    shape = None if weights is None else weights.shape[-2 if num_splits > 1 else -1 :]
    return Moments(
        zeros(inputs, inputs),
        zeros(columns, inputs),
        zeros(columns, columns),
        None if shape is None else zeros(*shape),
        0,
    )
