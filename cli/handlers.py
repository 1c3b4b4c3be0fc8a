"""One function per command: import what it needs, call it, return the exit code.

A run file is read before the command is imported, so that its mistakes show without waiting for the rest.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

Handler = Callable[[Namespace], int]


def train(arguments: Namespace) -> int:
    """`molora train`."""
    from molora.runfile import check_versions, load_run_file

    check_versions()
    run_file = load_run_file(arguments.file, arguments.overrides)
    if run_file.wants_processes:
        from molora.commands.launch import is_launched, launch

        if not is_launched():
            return launch(run_file, arguments.words)
    from molora.commands.train import run

    return run(run_file)


def plan(arguments: Namespace) -> int:
    """`molora plan`."""
    from molora.runfile import check_versions, load_run_file

    check_versions()
    run_file = load_run_file(arguments.file, arguments.overrides)
    from molora.commands.plan import run

    return run(run_file)


def generate(arguments: Namespace) -> int:
    """`molora generate`."""
    from molora.commands.generate import run

    return run(
        arguments.directory,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        base_model=arguments.base_model,
        task=arguments.task,
        scores=arguments.scores,
    )


def init(arguments: Namespace) -> int:
    """`molora init`."""
    from molora.commands.init import run

    return run(arguments.file, preset=arguments.preset, model=arguments.model, data=arguments.data)


def compare(arguments: Namespace) -> int:
    """`molora compare`."""
    from molora.commands.compare import run

    return run(arguments.directories, output=arguments.output)


def chat(arguments: Namespace) -> int:
    """`molora chat`."""
    from molora.commands.chat import run

    return run(
        arguments.directory,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        base_model=arguments.base_model,
        system=arguments.system,
        show_routing=arguments.show_routing,
        task=arguments.task,
        scores=arguments.scores,
    )


def compose(arguments: Namespace) -> int:
    """`molora compose`."""
    from molora.commands.compose import run

    return run(
        arguments.directory,
        arguments.adapter,
        base_model=arguments.base_model,
        preset=arguments.preset,
        overrides=arguments.overrides,
        shots=arguments.shots,
        select=arguments.select,
    )


_NOT_OPTIONS = ("handler", "words", "debug", "version", "directory", "out", "calibrate")


def _files(arguments: Namespace) -> list[str] | None:
    """Files to calibrate with; `--calibrate` without one stands for the data of the run, which is an empty list."""
    return None if arguments.calibrate is None else [file for file in arguments.calibrate if file]


def export(arguments: Namespace) -> int:
    """`molora export`."""
    from molora.commands.export import run

    options = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS}
    options["score"] = tuple(arguments.score)
    return run(arguments.directory, arguments.out, calibrate=_files(arguments), **options)


def merge(arguments: Namespace) -> int:
    """`molora merge`."""
    arguments.target = "dense"
    return export(arguments)


def evaluate(arguments: Namespace) -> int:
    """`molora eval`."""
    from molora.commands.evaluate import run

    options = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS}
    return run(arguments.directory, **options)


def prune(arguments: Namespace) -> int:
    """`molora prune`."""
    from molora.commands.prune import run

    options = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS}
    return run(arguments.directory, arguments.out, calibrate=_files(arguments), **options)


def serve(arguments: Namespace) -> int:
    """`molora serve`."""
    from molora.commands.serve import run

    options = {name: value for name, value in vars(arguments).items() if name not in (*_NOT_OPTIONS, "adapters")}
    return run(arguments.adapters, **options)


def check_serving(arguments: Namespace) -> int:
    """`molora check-serving`."""
    from molora.commands.check_serving import run

    options = {name: value for name, value in vars(arguments).items() if name not in (*_NOT_OPTIONS, "prompt")}
    return run(arguments.directory, prompts=arguments.prompt, **options)


def import_adapter(arguments: Namespace) -> int:
    """`molora import`."""
    from molora.commands.import_adapter import run

    *folders, out = arguments.directories
    return run(folders, out, base_model=arguments.base_model, preset=arguments.preset, adapters=arguments.adapter)


def inspect(arguments: Namespace) -> int:
    """`molora inspect`."""
    from molora.commands.inspect import run

    return run(arguments.directory)


def report(arguments: Namespace) -> int:
    """`molora report`."""
    from molora.commands.report import run

    options = {name: value for name, value in vars(arguments).items() if name not in _NOT_OPTIONS}
    return run(arguments.directory, arguments.out, **options)


def presets(arguments: Namespace) -> int:
    """`molora presets`."""
    from molora.commands.presets import run

    return run()


def schema(arguments: Namespace) -> int:
    """`molora schema`."""
    from molora.commands.schema import run

    return run()


def env(arguments: Namespace) -> int:
    """`molora env`."""
    from molora.commands.env import run

    return run()


def completion(arguments: Namespace) -> int:
    """`molora completion`."""
    from molora.commands.completion import run
    from molora_cli.arguments import build

    return run(arguments.shell, *build())
