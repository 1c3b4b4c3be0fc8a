"""`RoutedLM`: the Hugging Face model of lm-evaluation-harness, telling routing what it needs.

The harness pads on the right and passes no attention mask when it scores choices. That is right for causal attention
and for decisions about tokens, and wrong for a decision about a whole sequence, which would read padding and the
choice itself. Such adapters get batches without padding, and are told which tokens are the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.harness.rows import EXPERT_SCORES, PROMPT_IDS, TASK_ID, completion_ids
from molora.heads import generation_needs
from molora.likelihood import pad_with_mask, routed
from molora.routing.inputs import routing_inputs, scopes

Scored = tuple[tuple[str, str], list[int], list[int]]
"""Texts, and the ids of context and continuation."""


class Encoded(str):
    """A prompt that goes through the harness as text and knows its ids, as other texts may decode to the same.

    Attributes:
        ids: Its tokens.
    """

    ids: list[int]

    @classmethod
    def of(cls, request: Instance) -> Encoded:
        """The prompt of one of molora's rows."""
        text = cls(request.args[0])
        text.ids = list(request.doc[PROMPT_IDS])
        return text


class RoutedLM(HFLM):
    """`HFLM` for a model object, with the routing inputs of each request.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        tokenizer: Its tokenizer.
        batch_size: Rows of a forward pass.
        task_id: The task of requests that do not say theirs.
        expert_scores: Scores of requests that bring none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        task_id: int | None = None,
        expert_scores: tuple[float, ...] = (),
    ) -> None:
        # Log-likelihoods of a 16-bit model differ by less than 16 bits can tell apart.
        options: dict[str, Any] = {"backend": "causal", "batch_size": batch_size, "softmax_dtype": "float32"}
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self._default = (task_id, expert_scores)
        self._given: tuple[int | None, tuple[float, ...]] = self._default
        self._prompt_length: int | None = None
        self._by_sequence = any(scope.always for scope in scopes(model))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; those of molora's rows by the ids they have in training."""

        def score(group: list[Instance]) -> list[tuple[float, bool]]:
            if PROMPT_IDS not in group[0].doc:
                return super(RoutedLM, self).loglikelihood(group, disable_tqdm=disable_tqdm)
            rows = [(request.args, list(request.doc[PROMPT_IDS]), completion_ids(request)) for request in group]
            return self._loglikelihood_tokens(rows, disable_tqdm=disable_tqdm)

        return self._by_routing(requests, score)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts."""
        return self._by_routing(
            requests, lambda group: super(RoutedLM, self).loglikelihood_rolling(group, disable_tqdm)
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts; those of molora's rows by the ids they have in training."""

        def generate(group: list[Instance]) -> list[str]:
            if PROMPT_IDS in group[0].doc:
                group = [replace(one, arguments=(Encoded.of(one), *one.args[1:])) for one in group]
            return super(RoutedLM, self).generate_until(group, disable_tqdm=disable_tqdm)

        return self._by_routing(requests, generate)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Encode prompts, keeping the end of those that are too long."""
        encoded = [text for text in strings if isinstance(text, Encoded)]
        if not encoded:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [text.ids[-(left_truncate_len or 0) :] for text in encoded]
        return pad_with_mask(rows, int(self.tokenizer.pad_token_id), "left", torch.device("cpu"))

    def _by_routing(self, requests: list[Instance], run: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        """Run requests in groups whose routing is given the same, and return the results in their order."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[self._routing_of(request), PROMPT_IDS in request.doc].append(index)
        results: list[Any] = [None] * len(requests)
        for (given, _), indices in groups.items():
            self._given = given
            try:
                for index, result in zip(indices, run([requests[index] for index in indices]), strict=True):
                    results[index] = result
            finally:
                self._given = self._default
        return results

    def _routing_of(self, request: Instance) -> tuple[int | None, tuple[float, ...]]:
        task_id, scores = self._default
        if TASK_ID not in request.doc:  # not one of molora's rows
            return task_id, scores
        own = request.doc[TASK_ID]
        return (task_id if own is None else own), tuple(request.doc[EXPERT_SCORES]) or scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score by ids; where a decision is about the sequence, in batches of one shape."""
        score = super()._loglikelihood_tokens
        if not self._by_sequence:
            return score(list(requests), disable_tqdm=disable_tqdm, override_bs=override_bs)
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            total = min(len(context) + len(continuation), self.max_length + 1)
            shapes[total, total - len(continuation)].append(index)
        results: list[Any] = [None] * len(requests)
        for (_, prompt), indices in shapes.items():
            with self._with_prompt(prompt):
                group = score([requests[index] for index in indices], disable_tqdm=True)
            for index, result in zip(indices, group, strict=True):
                results[index] = result
        return results

    @contextmanager
    def _with_prompt(self, length: int) -> Iterator[None]:
        # A continuation that fills the whole context leaves its first token to decide by.
        self._prompt_length = max(length, 1)
        try:
            yield
        finally:
            self._prompt_length = None

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with self._routing(inps):
            return super()._model_call(inps, attn_mask, labels)

    def _routing(self, inps: Tensor) -> Any:
        """A block for one forward pass over `[B, S]`."""
        task_id, scores = self._given
        given: dict[str, Any] = {}
        if task_id is not None:
            given["task_ids"] = torch.tensor([task_id], device=inps.device)
        if scores:
            given["expert_scores"] = torch.tensor([scores], device=inps.device)
        if self._prompt_length is not None:
            before = torch.arange(inps.shape[1], device=inps.device) < self._prompt_length
            given["prompt_mask"] = before.expand(inps.shape)
        return routing_inputs(self.model, **given) if given and scopes(self.model) else nullcontext()

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        task_id, scores = self._given
        with routed(self.model, task_id, [scores]), self._needs():
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    @contextmanager
    def _needs(self) -> Iterator[None]:
        """A block in which the model generates as its adapters need; the harness always says `use_cache=True`."""
        model: Any = self.model
        needs, generate = generation_needs(model), model.generate
        if not needs:
            yield
            return
        model.generate = lambda **given: generate(**given | needs)
        try:
            yield
        finally:
            del model.generate  # that of its class is left
