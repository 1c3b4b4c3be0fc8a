"""Start `molora train` in several processes, through accelerate's own launcher."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from molora.runfile import RunFile, check_output_dir
from molora.runfile.document import expand
from molora.runfile.run import accelerate_profiles

LAUNCHED = "MOLORA_LAUNCHED"
"""Environment variable that tells a process that `launch` started it."""

SET_BY_LAUNCHERS = (LAUNCHED, "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Environment variables that a started process has."""

_DEFAULT = "ddp"
_REPORTED = (1, 2, 130)
"""Exit codes of a `molora` that has said itself what was wrong."""


def is_launched() -> bool:
    """Whether a launcher started this process: this module, `accelerate launch`, torchrun or mpirun."""
    return any(name in os.environ for name in SET_BY_LAUNCHERS)


def launch(run_file: RunFile, words: Sequence[str]) -> int:
    """Run a command line again in the processes its run file asks for, and wait for them.

    Args:
        run_file: What the command line says.
        words: That command line, after `molora`.

    Returns:
        The exit code of the process that failed first, or 0.

    Raises:
        ConfigError: If this machine cannot run the processes, or the run cannot be carried out as it stands.
        RuntimeError: If a process ended without saying why.
    """
    check_output_dir(run_file)
    check_machine(run_file)
    # What went wrong is said by the processes themselves; the launcher would add a page of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    arguments = launch_command_parser().parse_args([*_options(run_file), "-m", "molora_cli", *words])
    os.environ[LAUNCHED] = "1"
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(failure.exitcode, f"process {rank}")
    except subprocess.CalledProcessError as error:
        return _code(error.returncode, "the process")
    except SignalException as stop:
        if stop.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        del os.environ[LAUNCHED]
    return 0


def check_machine(run_file: RunFile) -> None:
    """Make sure that this machine can run the processes, before they all fail one by one.

    Raises:
        ConfigError: Pointing at the line of the key at fault.
    """
    profile, count = run_file.launch.accelerate_config or _DEFAULT, run_file.launch.num_processes
    named = profile in accelerate_profiles()
    field = "accelerate_config" if run_file.gives("accelerate_config") else "num_processes"
    if not named:
        try:
            load_config_from_file(str(_config_file(run_file)))
        except (ValueError, yaml.YAMLError, AttributeError, TypeError, OSError) as error:
            message = f"{profile!r} is no file of `accelerate config`: {error}"
            raise run_file.error(field, message) from error
    kind = _kind(run_file)
    on_cpu = run_file.training.get("use_cpu", False) or not torch.accelerator.is_available()
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise run_file.error(field, f"{profile!r} needs DeepSpeed, which is not installed: pip install deepspeed.")
    if on_cpu and kind in ("FSDP", "DEEPSPEED"):
        raise run_file.error(
            field, f"{profile!r} shares a model among GPUs, and this run has none; use 'ddp', which also runs on CPUs."
        )
    if not named:
        return
    devices = 0 if on_cpu else torch.accelerator.device_count()
    if count is None and on_cpu:
        raise run_file.error(field, f"{profile!r} needs to know how many processes to start; set num_processes.")
    if count is not None and 0 < devices < count:
        raise run_file.error(
            "num_processes",
            f"got {count}, and this machine has {devices} GPU{'s' * (devices > 1)}; one process a GPU.",
        )


def _kind(run_file: RunFile) -> str:
    """The `distributed_type` of the accelerate configuration."""
    content = yaml.safe_load(_config_file(run_file).read_text(encoding="utf-8"))
    return str(content.get("distributed_type", "")).upper() if isinstance(content, dict) else ""


def _config_file(run_file: RunFile) -> Path:
    given = run_file.launch.accelerate_config or _DEFAULT
    return accelerate_profiles().get(given) or expand(given)


def _options(run_file: RunFile) -> list[str]:
    """The words for accelerate's launcher that come before the command to run."""
    given, count = run_file.launch.accelerate_config or _DEFAULT, run_file.launch.num_processes
    options = ["--config_file", str(_config_file(run_file))]
    if given in accelerate_profiles():
        count = count or torch.accelerator.device_count()
        # Any free port: two runs on one machine must not meet.
        options += ["--main_process_port", "0"]
    return options if count is None else [*options, "--num_processes", str(count)]


def _code(code: int, process: str) -> int:
    if code in _REPORTED:
        return code
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; most often for want of memory" if name == "SIGKILL" else ""
        raise RuntimeError(f"{process} was ended by {name}{memory}")
    raise RuntimeError(f"{process} ended with exit code {code}")
