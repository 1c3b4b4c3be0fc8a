"""What PyTorch answers: transformers, PEFT and molora, one prompt after the other, in fp32."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checks import Answer, compare
from peft import PeftModel
from transformers import AutoModelForCausalLM

from molora.writing import new_file

WRONG: dict[str, dict[str, Any]] = {
    "top-1": {"top_k": 1},
    "all gates one": {"selection": "dense", "weights": "one", "renormalize": False},
}
"""Routing choices that are not the adapter's, by what is wrong with them."""


def write_references(folder: Path, base: str, prompts: Sequence[list[int]], new_tokens: int, wronged: str) -> None:
    """Write `reference.json`, see `checks.Reference`.

    Args:
        folder: It has a folder `adapters` with one of each adapter.
        base: Folder of the base model.
        prompts: Token ids.
        new_tokens: Longest answer.
        wronged: The adapter that is also answered for with wrong routing.
    """
    runs: dict[str, list[Answer]] = {}
    controls: dict[str, list[Answer]] = {}

    def ask(model: Any) -> list[Answer]:
        return [_answer(model, ids, new_tokens) for ids in prompts]

    runs["base"] = ask(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    for adapter in sorted((folder / "adapters").iterdir()):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = PeftModel.from_pretrained(model, adapter).eval()
        runs[adapter.name] = ask(adapted)
        if adapter.name == wronged:
            controls = {f"{wronged}: {what}": wrong for what, wrong in _wrong(adapted, ask)}
    _check(runs, controls)
    told = {"base": base, "prompts": prompts, "new_tokens": new_tokens, "runs": runs, "controls": controls}
    with new_file(folder / "reference.json") as file:
        file.write_text(json.dumps(told, indent=1))


@torch.no_grad()
def _answer(model: Any, ids: list[int], new_tokens: int) -> Answer:
    """Continue token ids greedily, with the logarithm of each token's probability."""
    out = model.generate(
        input_ids=torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    tokens = out.sequences[0, len(ids) :].tolist()
    logprobs = torch.cat(out.logits).double().log_softmax(-1)
    return {
        "tokens": tokens,
        "logprobs": [float(row[token]) for row, token in zip(logprobs, tokens, strict=True)],
    }


def _wrong(model: Any, ask: Callable[[Any], list[Answer]]) -> Iterator[tuple[str, list[Answer]]]:
    for what, choices in WRONG.items():
        with _routed(model, choices):
            yield what, ask(model)


@contextmanager
def _routed(model: Any, choices: Mapping[str, Any]) -> Iterator[None]:
    """Let an adapter route as it was not trained to."""
    specs = [module.molora_spec for module in model.modules() if hasattr(module, "molora_spec")]
    before = [dict(spec) for spec in specs]
    for spec in specs:
        spec.update({name: replace(own, **choices) for name, own in spec.items()})
    try:
        yield
    finally:
        for spec, old in zip(specs, before, strict=True):
            spec.update(old)


def _check(runs: Mapping[str, list[Answer]], controls: Mapping[str, list[Answer]]) -> None:
    """A reference proves something only if what is wrong would be seen: no two of them may be the same."""
    every = {**runs, **controls}
    names = list(every)
    same = [
        f"{one} and {other}"
        for place, one in enumerate(names)
        for other in names[place + 1 :]
        if not compare(every[one], every[other]).is_different
    ]
    assert not same, f"these answer the same, so that nothing could be told apart: {same}"
    assert len(controls) == len(WRONG), "the adapter to answer for with wrong routing is missing"
