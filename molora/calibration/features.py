"""What routers read of calibration rows: features of real tokens, collected in as many passes as memory asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.heads import last_logits_only
from molora.kernels.dispatch import using
from molora.modes import evaluating
from molora.plain.moments import Batch, run_batch
from molora.progress import bar
from molora.routing import RouterInput
from molora.routing.masks import TokenMasks, reads_decoder

MAX_TOKENS = 8192
"""Tokens that are kept of each input; of more, a random part."""

MAX_MEMORY = 4 * 2**30
"""Bytes of features held at a time."""


@dataclass(frozen=True)
class Features:
    """What routers read of some rows.

    Attributes:
        x: `[T, in]`, fp32: one vector a token, or one a row for decisions about sequences.
        row: `[T]`, the row each is of.
        answer: Boolean `[T]`, whether it predicts a token that the model is trained on.
        first: Boolean `[T]`, whether it is a row's first token, whose hidden state says nothing about the row.
    """

    x: Tensor
    row: Tensor
    answer: Tensor
    first: Tensor


@torch.no_grad()
def collect_features(
    model: nn.Module, readers: Sequence[Any], name: str, batches: Sequence[Batch], seed: int, progress: bool
) -> Iterator[tuple[Features, list[Any]]]:
    """Run the batches through the model and keep what routers read.

    Args:
        model: The adapted model; left in the mode it was in.
        readers: The modules that hold the routers.
        name: The adapter, which must be active.
        batches: Keyword arguments of the model.
        seed: For the choice of tokens, where there are too many.
        progress: Show a progress bar.

    Yields:
        One distinct input at a time, and the modules that read it.

    Raises:
        MoloraError: If a module saw no token.
    """
    kept, tokens = _choose_tokens(batches, seed)
    groups = list(_groups(readers, name, tokens))
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    options |= last_logits_only(model)
    total = len(groups) * len(batches)
    with bar(total, "calibrating routers", "batch", shown=progress) as shown:
        for group in groups:
            collector = _Collector(group, name)
            with evaluating(model), using("reference"), collector.attached():
                for batch, chosen in zip(batches, kept, strict=True):
                    run_batch(model, batch, partial(collector.begin, batch, chosen), **options)
                    shown.update()
            yield from collector.inputs()


def _choose_tokens(batches: Sequence[Batch], seed: int) -> tuple[list[Tensor], int]:
    """For each batch which tokens to keep, `[B, S]`, and their number in all; the same for every module."""
    generator = torch.Generator().manual_seed(seed)
    real = [_real_tokens(batch) for batch in batches]
    share = min(1.0, MAX_TOKENS / max(1, sum(int(mask.sum()) for mask in real)))
    kept = [mask & (torch.rand(mask.shape, generator=generator) < share) if share < 1 else mask for mask in real]
    return kept, sum(int(mask.sum()) for mask in kept)


def _real_tokens(batch: Batch) -> Tensor:
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.cpu().bool()
    given = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim >= 2), None)
    if given is None:
        raise MoloraError(f"a calibration batch holds {', '.join(batch) or 'nothing'}; it needs `input_ids` [B, S].")
    return torch.ones(given.shape[:2], dtype=torch.bool)


def _groups(readers: Sequence[Any], name: str, tokens: int) -> Iterator[list[Any]]:
    """Cut the modules into runs whose inputs fit into memory; siblings, which read the same, count once."""
    group: list[Any] = []
    seen: set[int] = set()
    held = 0
    for layer in readers:
        key = id(layer.molora_input.get(name, layer))
        needs = 0 if key in seen else 4 * tokens * layer.router_of(name).weight.shape[-1]
        if group and held + needs > MAX_MEMORY:
            yield group
            group, held, seen = [], 0, set[int]()
        seen.add(key)
        group.append(layer)
        held += needs
    if group:
        yield group


class _Collector:
    """What the routers of some modules read."""

    def __init__(self, readers: Sequence[Any], name: str) -> None:
        self.readers, self.name = readers, name
        self._batch: Batch = {}
        self._masks, self._chosen = TokenMasks(), torch.empty(0)
        self._real = torch.empty(0)
        self._rows = self._texts = 0
        self._parts: dict[int, list[tuple[Tensor, ...]]] = {}
        self._now: dict[int, tuple[Tensor, Any]] = {}
        self._of: dict[int, int] = {}

    def begin(self, batch: Batch, chosen: Tensor, masks: TokenMasks) -> None:
        """A forward pass begins."""
        self._rows += max(len(self._chosen), self._texts)
        self._texts = 0
        self._batch, self._chosen, self._masks = batch, chosen, masks
        self._real = _real_tokens(batch)
        self._now.clear()

    def attached(self) -> ExitStack:
        """Listen to the routers inside the block."""
        stack = ExitStack()
        for layer in self.readers:
            router = layer.router_of(self.name)
            stack.callback(router.register_forward_pre_hook(partial(self._see, layer)).remove)
        stack.callback(self._now.clear)
        return stack

    def _see(self, layer: Any, router: nn.Module, args: tuple[RouterInput]) -> None:
        x = args[0].x
        if x is None:
            return
        siblings = id(layer.molora_input.get(self.name, layer))
        first, owner = self._now.setdefault(siblings, (x, layer))
        same = first is x or (first.shape == x.shape and torch.equal(first, x))
        key = siblings if same else id(layer)
        if self._of.setdefault(id(layer), key) != key:
            raise MoloraError(f"{layer.module_key} shares its input with its siblings in some calls only.")
        if key == siblings and owner is not layer:
            return
        self._parts.setdefault(key, []).append(self._tokens(layer, x))

    def _tokens(self, layer: Any, x: Tensor) -> tuple[Tensor, ...]:
        """What `Features` holds, of one batch."""
        if x.ndim == 2 and len(x) == self._chosen.numel():  # some blocks put all rows' tokens into one
            x = x.unflatten(0, self._chosen.shape)
        pooled = x.ndim == 2 and len(x) == len(self._chosen)
        if pooled or layer.molora_plan[self.name].level == "sequence":
            all_rows = torch.ones(len(x), dtype=torch.bool)
            return x.flatten(0, -2), torch.arange(len(x)) + self._rows, all_rows, ~all_rows
        shape = x.shape[:-1]
        chosen, answers = self._chosen, _answers(self._batch, self._chosen)
        if self._masks.encoder_decoder or chosen.shape != shape:  # its decoder writes answers, its encoder reads
            mask = self._masks.of_layer(layer.routing_name, shape)
            chosen = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
            answers = torch.full_like(chosen, reads_decoder(layer.routing_name))
        row = torch.arange(shape[0]).unsqueeze(1) if len(shape) == 2 else torch.zeros(1, dtype=torch.long)
        row = row.expand(shape)
        first = self._real.cumsum(dim=-1) == 1 if self._real.shape == shape else torch.zeros_like(chosen)
        positions = self._batch.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape == shape:  # several texts may be packed into a row
            first = positions.cpu() == 0
            row = first.flatten().cumsum(dim=0).reshape(shape)
            self._texts = max(self._texts, int(row.max()) + 1)
        return x[chosen.to(x.device)], (row + self._rows)[chosen], answers[chosen], first[chosen]

    def inputs(self) -> Iterator[tuple[Features, list[Any]]]:
        """Each distinct input, with its readers; what was handed out is let go of."""
        for layer in self.readers:
            if id(layer) not in self._of:
                raise MoloraError(
                    f"no calibration token reached the router of {layer.module_key}; give rows that use it."
                )
        for key in list(self._parts):
            x, *others = (torch.cat(parts) for parts in zip(*self._parts.pop(key), strict=True))
            readers = [layer for layer in self.readers if self._of[id(layer)] == key]
            if not len(x):
                raise MoloraError("the calibration batches hold no real token.")
            if not bool(x.isfinite().all()):
                raise MoloraError(
                    f"{readers[0].module_key} reads values that are not finite in the calibration batches. In "
                    "16 bits, rows that begin with padding may do that; load the model with "
                    'attn_implementation="eager", or in fp32.'
                )
            yield (
                Features(x.float(), *(other.to(x.device) for other in others)),
                readers,
            )


def _answers(batch: Mapping[str, Any], like: Tensor) -> Tensor:
    """Boolean `[B, S]`: the tokens whose next one is labelled; all tokens where nothing says so."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != like.shape:
        return torch.ones_like(like)
    labelled = labels.cpu() != -100
    return torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], dim=1)
