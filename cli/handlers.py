"""One function per command: import what it needs, call it, return the exit code.

A run file is read before the command is imported, so that its mistakes show without waiting for the rest.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

Handler = Callable[[Namespace], int]


def train(arguments: Namespace) -> int:
    """`molora train`."""
    from molora.runfile import load_run_file

    run_file = load_run_file(arguments.file, arguments.overrides)
    from molora.commands import train

    return train.run(run_file)


def plan(arguments: Namespace) -> int:
    """`molora plan`."""
    from molora.runfile import load_run_file

    run_file = load_run_file(arguments.file, arguments.overrides)
    from molora.commands import plan

    return plan.run(run_file)


def generate(arguments: Namespace) -> int:
    """`molora generate`."""
    from molora.commands import generate

    return generate.run(
        arguments.directory,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        base_model=arguments.base_model,
    )


def inspect(arguments: Namespace) -> int:
    """`molora inspect`."""
    from molora.commands import inspect

    return inspect.run(arguments.directory)


def presets(arguments: Namespace) -> int:
    """`molora presets`."""
    from molora.commands import presets

    return presets.run()


def schema(arguments: Namespace) -> int:
    """`molora schema`."""
    from molora.commands import schema

    return schema.run()


def env(arguments: Namespace) -> int:
    """`molora env`."""
    from molora.commands import env

    return env.run()
