"""What slimming costs: the error of every module's output, and how far the model's answers moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from molora.evaluation import TaskScore
from molora.evaluation.record import as_entries
from molora.export.measure import divergences
from molora.heads import last_logits_only
from molora.modes import evaluating
from molora.plain.fixed import layers_of
from molora.plain.moments import Batch, run_batch
from molora.routing.masks import TokenMasks
from molora.slim.statistics import real_tokens
from molora.watch import Seen, watching

Score = Callable[[], list[TaskScore]]


@dataclass(frozen=True)
class Quality:
    """A slimmed adapter beside the one it came from, on held-out rows.

    Attributes:
        kl: Mean over labelled tokens of KL(before ‖ after), in nats.
        perplexity_before: Of the labelled tokens.
        perplexity_after: The same now.
        tokens: Labelled tokens.
        scores_before: Of every task with rows to score, by `molora.evaluation`.
        scores_after: The same now.
    """

    kl: float
    perplexity_before: float
    perplexity_after: float
    tokens: int
    scores_before: list[TaskScore] = field(default_factory=list)
    scores_after: list[TaskScore] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        scores = {
            "scores_before": as_entries(self.scores_before),
            "scores_after": as_entries(self.scores_after, self.scores_before),
        }
        return asdict(replace(self, scores_before=[], scores_after=[])) | scores


@torch.no_grad()
def output_errors(model: nn.Module, batches: Sequence[Batch], before: str, after: str) -> dict[str, float]:
    """Relative squared error `E‖Δ' − Δ‖² / E‖Δ‖²` of what each module adds to its output, for the same inputs.

    Args:
        model: A model with both adapters; the first is active.
        batches: Held-out rows, as for `expert_usage`.
        before: Name of the adapter as it was.
        after: Name of the slimmed one.

    Returns:
        One number a module, by its full name. Modules inside blocks that experts span as a whole are left out: what
        they read depends on the expert.
    """
    compare = _Comparison(before, after)
    layers = {name: layer for name, layer in layers_of(model, before).items() if not _in_block(layer, before)}
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "generate") else {}
    options |= last_logits_only(model)
    with evaluating(model), watching(layers.values(), compare.see):
        for batch in batches:
            run_batch(model, batch, compare.begin, **options)
    return {name: wrong / whole if whole else float(wrong > 0) for name, (wrong, whole) in compare.sums.items()}


def quality(
    model: nn.Module, batches: Sequence[Batch], before: str, after: str, score: Score | None = None
) -> Quality:
    """Compare the answers of a model with the one adapter and with the other; the first stays active.

    Args:
        model: A model with both adapters; the first is active.
        batches: Held-out rows with labels.
        before: Name of the adapter as it was.
        after: Name of the slimmed one.
        score: Scores tasks with the adapter that is active; `None` for no scores.
    """

    @contextmanager
    def slimmed() -> Iterator[None]:
        model.set_adapter(after)  # type: ignore[operator]  # a PEFT model
        try:
            yield
        finally:
            model.set_adapter(before)  # type: ignore[operator]  # likewise

    old, new = divergences(model, model, batches, slimmed)
    scores: list[list[TaskScore]] = [[], []]
    if score is not None:
        scores[0] = score()
        with slimmed():
            scores[1] = score()
    return Quality(float(new.kl or 0.0), old.perplexity, new.perplexity, old.tokens, *scores)


def _in_block(layer: Any, name: str) -> bool:
    group = layer.molora_group.get(name)
    return group is not None and group.spans_ffn


class _Comparison:
    """Lets the second adapter answer wherever the first one does."""

    def __init__(self, before: str, after: str) -> None:
        self.before, self.after = before, after
        self.sums: dict[str, tuple[float, float]] = {}
        self._masks = TokenMasks()

    def begin(self, masks: TokenMasks) -> None:
        """A forward pass begins."""
        self._masks = masks

    def see(self, layer: Any, name: str, seen: Seen) -> None:
        """Called by every adapted module, for the second adapter too."""
        if name != self.before:
            return
        real = real_tokens(self._masks, layer, seen.x)
        old = self._rows(layer.output(name, seen.gated.to(layer.up_matrix(name).dtype)), seen, real)
        new = self._rows(layer.delta(self.after, seen.x), seen, real)
        wrong, whole = self.sums.get(layer.module_key, (0.0, 0.0))
        self.sums[layer.module_key] = (
            wrong + float((new - old).square().sum()),
            whole + float(old.square().sum()),
        )

    @staticmethod
    def _rows(values: Tensor, seen: Seen, real: Tensor) -> Tensor:
        return values.expand(*seen.x.shape[:-1], values.shape[-1]).flatten(0, -2)[real].double()
