"""`molora serve`: start vLLM's OpenAI-compatible server with mixtures and plain LoRAs."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from rich.console import Console
from transformers import AutoConfig

from molora.base import resolve_base
from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.folders import unusable
from molora.loaded import read_any_config
from molora.serving.launch import (
    Launch,
    Options,
    ServedAdapter,
    build,
    flags,
    hot_load_lines,
    lora_dtype,
    named_folders,
)
from molora.serving.machine import check_vllm, this_machine
from molora.serving.ranks import served_rank
from molora.serving.templates import TEMPLATE_FILE, choose_template, read_template


def run(
    adapters: Sequence[str],
    *,
    base_model: str | None = None,
    dtype: str = "auto",
    hot_load: bool = False,
    dry_run: bool = False,
    vllm: Sequence[str] = (),
    **options: Any,
) -> int:
    """Become the server: signals and the exit code are its own.

    Args:
        adapters: Folders of mixtures and plain LoRAs, `DIR` or `NAME=DIR`.
        base_model: Base model to use instead of the one named in the adapters.
        dtype: Precision, as vLLM's `--dtype`.
        hot_load: Whether adapters can be loaded and unloaded while it runs.
        dry_run: Print the command instead.
        vllm: Further arguments of vLLM.
        **options: Further fields of `molora.serving.launch.Options`.

    Returns:
        0 after a dry run; else it does not return.

    Raises:
        ConfigError: If an adapter cannot be served, the adapters have different base models, options contradict each
            other, or vLLM is missing or cannot start.
    """
    folders = named_folders(adapters, lambda path: Path(path).expanduser().is_dir())
    folders = {name: str(Path(path).expanduser().absolute()) for name, path in folders.items()}
    configs = _read_all(folders)
    if not dry_run:
        check_vllm(any(isinstance(config, MoLoraConfig) for config in configs.values()))
    given = flags(vllm)
    name = given.get("model") or base_model or common_base(configs, folders)
    base = resolve_base(name)
    precision = getattr(torch, lora_dtype(given, dtype, checkpoint_dtype(base)), None)
    if precision not in (torch.float32, torch.bfloat16, torch.float16):
        allowed = "float32, bfloat16, float16 or auto"
        raise ConfigError([Problem("--dtype", f"must be {allowed}.")], "cannot serve like this")
    ranks = {key: adapter_rank(folders[key], config, precision) for key, config in configs.items()}
    template, note = (None, None) if "chat-template" in given else _template(base, folders)
    launch = build(
        [
            ServedAdapter(key, folders[key], rank, isinstance(configs[key], MoLoraConfig))
            for key, rank in ranks.items()
        ],
        base,
        Options(
            base_names=tuple(dict.fromkeys([Path(name).expanduser().absolute().name, name])),
            dtype=dtype,
            hot_load=hot_load,
            chat_template=template,
            vllm=tuple(vllm),
            **options,
        ),
        this_machine(),
    )
    if note is not None:
        _say(note)
    if dry_run:
        print(launch.line(sys.executable))  # noqa: T201
        return 0
    if hot_load:
        where = [given.get(key) or options[key] for key in ("host", "port")]
        load, unload = hot_load_lines(*map(str, where))
        _say(f"Once it runs, to load an adapter and to unload it:\n{load}\n{unload}")
    _become(launch)


def adapter_rank(directory: str, config: PeftConfig, dtype: torch.dtype) -> int:
    """Rank that an adapter of any kind takes on a server.

    Args:
        directory: Its folder.
        config: Its config.
        dtype: The precision it is served in.

    Raises:
        ConfigError: If it cannot be served.
    """
    if isinstance(config, MoLoraConfig):
        return served_rank(directory, dtype)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise unusable(directory, f"holds an adapter of type {kind}; vLLM serves mixtures of molora and plain LoRAs.")
    fields: Any = config
    return max([fields.r, *(fields.rank_pattern or {}).values()])


def common_base(configs: Mapping[str, PeftConfig], folders: Mapping[str, str]) -> str:
    """The base model that all adapters name.

    Raises:
        ConfigError: If one names none, or they differ.
    """
    named = {name: config.base_model_name_or_path for name, config in configs.items()}
    problems = [
        Problem(folders[name], "does not name its base model; pass --base-model.")
        for name, base in named.items()
        if not base
    ]
    if problems:
        raise ConfigError(problems, "the base model is not known")
    if len({_place(str(base)) for base in named.values()}) > 1:
        problems = [Problem(folders[name], f"was trained on {base}") for name, base in named.items()]
        remedy = "a server has one base model; serve them apart, or say which with --base-model."
        raise ConfigError([*problems, Problem("", remedy)], "the adapters have different base models")
    return str(next(iter(named.values())))


def checkpoint_dtype(base: str) -> str | None:
    """The precision that the config of a model names, if it can be read."""
    try:
        found = AutoConfig.from_pretrained(base).get_text_config().dtype
    except (OSError, ValueError):
        return None  # vLLM says what is wrong with it, if anything is
    return None if found is None else str(found).removeprefix("torch.")


def _read_all(folders: Mapping[str, str]) -> dict[str, PeftConfig]:
    configs: dict[str, PeftConfig] = {}
    problems: list[Problem] = []
    for name, directory in folders.items():
        try:
            config = read_any_config(directory)
            if config is None:
                raise unusable(directory, "holds a model, not an adapter.")
            configs[name] = config
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems, "unusable adapter")
    return configs


def _place(base: str) -> str:
    resolved = resolve_base(base)
    return str(Path(resolved).expanduser().resolve()) if Path(resolved).expanduser().is_dir() else resolved


def _template(base: str, folders: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The file of the chat template, if it is an adapter's, and what to say about it."""
    # Only what lies in a file of its own can be handed to the server.
    own = {
        name: read_template(path) if (Path(path) / TEMPLATE_FILE).is_file() else None for name, path in folders.items()
    }
    chosen, note = choose_template(read_template(base), own)
    return None if chosen is None else str(Path(folders[chosen]) / TEMPLATE_FILE), note


def _become(launch: Launch) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *launch.words], {**os.environ, **launch.environment})


def _say(text: str) -> None:
    """On stderr, so that what a dry run prints can be used as it is."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)
