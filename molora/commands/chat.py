"""`molora chat`: talk to an adapter, and see which experts speak."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molora.commands.generate import Streamer, answer, encoded, opened, user
from molora.reports.watch import watch_text

HELP = "/reset forgets the conversation, /quit or the end of input ends it."

STYLES = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2", "#999999")
"""Colours that most people can tell apart (Okabe and Ito); experts beyond take them again, underlined."""


def run(
    directory: str,
    *,
    max_new_tokens: int,
    temperature: float,
    base_model: str | None,
    system: str | None = None,
    show_routing: bool = False,
    task: str | None = None,
    scores: list[float] | None = None,
) -> int:
    """Read lines and answer them until the input ends.

    Args:
        directory: Folder of the adapter.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token each time.
        base_model: Base model to use instead of the one named in the adapter.
        system: What the conversation begins with.
        show_routing: Colour the tokens of an answer by the expert that counts most for them.
        task: Name or id of the task, for adapters whose routing reads it.
        scores: A number per expert, likewise.

    Raises:
        ConfigError: If there is no adapter in the folder, its base model is not known, or its routing needs something
            that is not given.
    """
    model, tokenizer, given = opened(directory, base_model, task, scores)
    console = Console(highlight=False)
    console.print(HELP, style="dim")
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _lines(console):
        if line == "/reset":
            messages = list(start)
            continue
        messages.append(user(line))
        before = encoded(tokenizer, messages)["input_ids"].shape[1]
        streamer = None if show_routing else Streamer(tokenizer)
        ids = answer(model, tokenizer, messages, max_new_tokens, temperature, given, streamer)
        if show_routing:
            _show(console, ids, before, tokenizer, by_expert(model, ids, given))
        said = str(tokenizer.decode(ids[before:], skip_special_tokens=True)).strip()
        messages.append({"role": "assistant", "content": said})
    return 0


def by_expert(model: torch.nn.Module, ids: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
    """Shares of mixing weight of every token, averaged over linears, `[T, E]`; `None` if nothing is routed.

    Args:
        model: The adapted model.
        ids: `[T]`.
        given: What the routing reads besides the tokens.
    """
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), **given}
    found = list(watch_text(model, batch).values())
    if not found:
        return None
    # Linears may differ in how many experts they have.
    widest = max(weights.shape[1] for weights in found)
    wide = [torch.nn.functional.pad(weights, (0, widest - weights.shape[1])) for weights in found]
    return torch.stack(wide).mean(dim=0)


def coloured(pieces: Sequence[str], weights: Tensor) -> Text:
    """Pieces of text, each in the colour of the expert that counts most for it.

    Args:
        pieces: T of them.
        weights: `[T, E]`.
    """
    text = Text()
    for piece, expert in zip(pieces, weights.argmax(dim=1).tolist(), strict=True):
        text.append(piece, style_of(expert))
    return text


def style_of(expert: int) -> str:
    """How an expert's tokens look."""
    return STYLES[expert % len(STYLES)] + " underline" * (expert >= len(STYLES))


def _lines(console: Console) -> Iterator[str]:
    """What is typed, or comes from a file; empty lines are passed over."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = console.input("[bold]> [/bold]") if asks else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _show(
    console: Console, ids: Tensor, before: int, tokenizer: PreTrainedTokenizerBase, weights: Tensor | None
) -> None:
    """Print an answer token by token, and below it how much each expert counted."""
    if weights is None:
        console.print(str(tokenizer.decode(ids[before:], skip_special_tokens=True)).strip(), markup=False)
        console.print("(nothing here is routed token by token)", style="dim")
        return
    special = set(tokenizer.all_special_ids)
    places = [place for place in range(before, len(ids)) if int(ids[place]) not in special]
    # A token is predicted where the one before it is read.
    read = weights[[place - 1 for place in places]]
    console.print(coloured([str(tokenizer.decode(ids[place])) for place in places], read), soft_wrap=True)
    legend = Text()
    if places:
        for expert in read.mean(dim=0).argsort(descending=True).tolist():
            legend.append(f"■ {expert} {float(read[:, expert].mean()):.0%}  ", style_of(expert))
    console.print(legend)
