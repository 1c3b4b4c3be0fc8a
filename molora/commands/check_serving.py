"""`molora check-serving`: does vLLM answer as PyTorch does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from molora.base import resolve_base
from molora.commands.serve import adapter_rank, common_base
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.folders import unusable
from molora.loaded import read_any_config
from molora.serving.answers import PROMPTS, Reference, prompt_ids
from molora.serving.comparison import TOLERANCES, Answer, Scores, Verdict, effect, judge
from molora.serving.engines import GROUPS, Job, Served, ask_engine, ask_server, names_on_server, server_models
from molora.serving.launch import NO_FLOAT32, cpu_environment
from molora.serving.machine import check_vllm, this_machine
from molora.serving.ranks import rank_for_vllm


@dataclass(frozen=True)
class Findings:
    """What came out.

    Attributes:
        verdicts: Of every answer, by group.
        effect: How much the adapter moves log-probabilities in PyTorch.
        tolerance: What counts as rounding.
    """

    verdicts: dict[str, list[Verdict]]
    effect: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether nothing is wrong."""
        return all(verdict.reason is None for group in self.verdicts.values() for verdict in group)

    @property
    def has_effect(self) -> bool:
        """Whether the adapter changes more than rounding does."""
        return self.effect > self.tolerance


def run(
    directory: str,
    *,
    prompts: Sequence[str] = (),
    max_new_tokens: int = 24,
    base_model: str | None = None,
    dtype: str | None = None,
    tolerance: float | None = None,
    tensor_parallel_size: int = 1,
    url: str | None = None,
    name: str | None = None,
) -> int:
    """Ask vLLM, let PyTorch read what it said, and print whether they agree.

    Args:
        directory: Folder of a mixture or a plain LoRA.
        prompts: What to ask; some of different kinds without.
        max_new_tokens: Longest answer.
        base_model: Base model to use instead of the one named in the adapter.
        dtype: Precision on both sides; without, float32 on CPUs, and float16 on GPUs, whose LoRA kernels know 16 bits.
        tolerance: Difference of a log-probability that is rounding; by `dtype` without.
        tensor_parallel_size: Processes that the engine shares the model among.
        url: A running server to ask instead of an engine of its own.
        name: What that server calls the adapter.

    Returns:
        0 if they agree, 1 if they do not.

    Raises:
        ConfigError: If the adapter cannot be served, or vLLM is missing.
        MoloraError: If a model cannot be loaded, or vLLM not be asked.
    """
    directory = str(Path(directory).expanduser())
    machine = this_machine()
    dtype = dtype or ("float16" if machine.on_gpu else "float32")
    if dtype == "float32" and machine.on_gpu and url is None:
        raise ConfigError([Problem("--dtype", NO_FLOAT32)], "cannot be checked like this")
    config = read_any_config(directory)
    if config is None:
        raise unusable(directory, "holds a model, not an adapter.")
    precision: torch.dtype = getattr(torch, dtype)
    rank = rank_for_vllm(adapter_rank(directory, config, precision))
    if url is None:
        check_vllm(isinstance(config, MoLoraConfig))
    base = resolve_base(base_model or common_base({directory: config}, {directory: directory}))
    texts = list(prompts) or list(PROMPTS)
    folder = str(Path(directory).expanduser().absolute())
    asked = prompt_ids(directory, base, texts)
    job = Job(base, folder, asked, max_new_tokens, dtype, rank, tensor_parallel_size)
    served = _ask(job, url, name)
    # After the engine is gone, so that both never need memory at once.
    reference = Reference(directory, base, precision)
    found = compare(served, reference, job, TOLERANCES[dtype] if tolerance is None else tolerance)
    _show(found, texts, dtype)
    return 0 if found.agrees else 1


def compare(served: Served, reference: Reference, job: Job, tolerance: float) -> Findings:
    """Let PyTorch read what was served.

    Args:
        served: The answers.
        reference: The model that reads them.
        job: What was asked.
        tolerance: What counts as rounding.
    """

    @cache  # alone and beside others, a model mostly says the same
    def scores(prompt: int, tokens: tuple[int, ...], adapted: bool) -> Scores:
        return reference.score(job.prompts[prompt], tokens, adapted)

    def verdict(group: str, prompt: int, answer: Answer) -> Verdict:
        read = scores(prompt, tuple(answer.tokens), group.endswith("adapter"))
        return judge(answer, read, tolerance, job.max_new_tokens, reference.ends)

    verdicts = {
        group: [verdict(group, prompt, answer) for prompt, answer in enumerate(answers)]
        for group, answers in served.items()
    }
    by_adapter = [(prompt, tuple(answer.tokens)) for prompt, answer in enumerate(served["adapter"])]
    moved = effect([scores(*one, True) for one in by_adapter], [scores(*one, False) for one in by_adapter])
    return Findings(verdicts, moved, tolerance)


def _ask(job: Job, url: str | None, name: str | None) -> Served:
    if url is not None:
        base, adapter = names_on_server(server_models(url), job.adapter, name)
        return ask_server(url, job, base, adapter)
    Console(stderr=True).print("Asking vLLM; its start can take minutes.", markup=False, highlight=False)
    given = {"tensor-parallel-size": str(job.tensor_parallel_size)}
    return ask_engine(job, cpu_environment(this_machine(), given))


def _show(found: Findings, texts: Sequence[str], dtype: str) -> None:
    console = Console()
    table = Table("asked", "answers", "tokens", "same", "worst", "")
    for group, verdicts in found.verdicts.items():
        tokens, same = (sum(getattr(one, what) for one in verdicts) for what in ("tokens", "same"))
        wrong = sum(one.reason is not None for one in verdicts)
        worst = max((one.worst for one in verdicts), key=lambda value: (value != value, value), default=0.0)
        row = (len(verdicts), tokens, same, f"{worst:.1e}", f"{wrong} wrong" if wrong else "right")
        table.add_row(GROUPS[group], *map(str, row))
    console.print(table)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for group, verdicts in found.verdicts.items():
        wrong_ones = [(text, one.reason) for text, one in zip(texts, verdicts, strict=True) if one.reason]
        for text, reason in wrong_ones[:1]:
            say(f"{GROUPS[group]}, {text.splitlines()[0][:60]!r}: {reason}")
    say(
        "Same: PyTorch would have chosen that token too. Worst: the largest difference of a log-probability; in "
        f"{dtype} up to {found.tolerance:g} is rounding. The adapter itself moves them by up to {found.effect:.2g}."
    )
    if not found.has_effect:
        say(
            "That is no more than rounding: on these prompts the adapter changes nothing, so this proves little. Ask "
            "what it was trained for: --prompt TEXT, several times."
        )
    say("yes: vLLM answers as PyTorch does." if found.agrees else "no: vLLM does not answer as PyTorch does.")
