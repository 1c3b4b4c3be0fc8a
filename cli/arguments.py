"""What may follow `molora` on the command line."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any

from molora_cli import handlers
from molora_cli.options import (
    add_asking,
    add_check_serving,
    add_eval,
    add_export,
    add_prune,
    add_report,
    add_serve,
)
from molora_cli.values import count

_RUN_COMMANDS = {
    "train": (handlers.train, "train an adapter as a run file says"),
    "plan": (handlers.plan, "show what `train` would do, without training"),
}
SHELLS = ("bash", "zsh", "fish", "tcsh", "powershell")
"""What `molora completion` writes for."""

_COMPOSE_OPTIONS = ("--base-model", "--adapter", "--preset", "--shots", "--select")
_FIELDS = "fields of the adapter to change: --key value, --key=value or key=value; top_k=3"
_OVERRIDES = "keys of the run file to change: --key value, --key=value or key=value; datasets.0.max_samples=10"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; the result has `handler` and that command's arguments.

    Raises:
        SystemExit: With 0 after printing help, with 2 after printing what is wrong.
    """
    parser, commands = build()
    if not words:
        parser.print_help()
        parser.exit(2)
    name = words[0]
    if name == "serve":
        return _parse_serve(parser, words)
    if not name.startswith("-") and name not in commands:
        close = difflib.get_close_matches(name, commands, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        parser.error(f"unknown command {name!r}; the commands are {', '.join(commands)}.{hint}")
    if name not in (*_RUN_COMMANDS, "compose") or {"-h", "--help"} & set(words):
        return parser.parse_args(words)
    # argparse cannot pass unknown options through in their order, so words among which there are keys are read here.
    if name == "compose":
        known, overrides = split_compose_words(words[1:])
        arguments = parser.parse_args([name, *known])
        arguments.overrides = [*arguments.overrides, *overrides]
        return arguments
    file, overrides = split_run_words(words[1:], commands[name])
    return argparse.Namespace(handler=_RUN_COMMANDS[name][0], file=file, overrides=overrides)


def _parse_serve(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Read the words before `--`; those behind it are vLLM's."""
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.vllm = list(words[end + 1 :])
    return arguments


def split_run_words(words: Sequence[str], parser: argparse.ArgumentParser) -> tuple[str, list[str]]:
    """Split the words of a run into its file, given first or by `--config`, and the overrides."""
    files, overrides, rest = [], [], list(words)
    if rest and not rest[0].startswith("-") and ("=" not in rest[0] or os.path.exists(rest[0])):
        files.append(rest.pop(0))
    while rest:
        word = rest.pop(0)
        if word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        elif word == "--config":
            if not rest:
                parser.error("--config needs a file.")
            files.append(rest.pop(0))
        else:
            overrides.append(word)
    if len(files) != 1:
        parser.error(f"two files given, {files[0]} and {files[1]}." if files else "give the run file first.")
    return files[0], overrides


def split_compose_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of `compose` into the folder and options of its own, and the keys of the adapter to change."""
    known: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        takes_next = word.startswith("-") and "=" not in word and rest and not rest[0].startswith("-")
        is_known = word.split("=", 1)[0] in _COMPOSE_OPTIONS or not ("=" in word or word.startswith("-"))
        (known if is_known else overrides).extend([word, rest.pop(0)] if takes_next else [word])
    return known, overrides


def build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Make the parser, and return it with those of its commands by name."""
    parser = argparse.ArgumentParser(
        prog="molora",
        description="Fine-tune a frozen language model with a mixture of LoRA experts.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, handler: handlers.Handler, help_text: str) -> argparse.ArgumentParser:
        commands[name] = subparsers.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        commands[name].set_defaults(handler=handler)
        return commands[name]

    for name, (handler, help_text) in _RUN_COMMANDS.items():
        run = add(name, handler, help_text)
        run.add_argument("file", metavar="FILE", help="the run file; also --config FILE")
        run.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=_OVERRIDES)
    init = add("init", handlers.init, "write a run file to start from, with comments")
    init.add_argument("file", nargs="?", default="run.yaml", metavar="FILE", help="default run.yaml")
    init.add_argument("--preset", default="recommended", metavar="NAME", help="method; default recommended")
    init.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", metavar="X", help="the base model")
    init.add_argument(
        "--data", action="append", default=[], metavar="FILE", help="rows to train on, one file per task"
    )
    generate = add("generate", handlers.generate, "let a trained adapter answer prompts")
    generate.add_argument("directory", metavar="DIR", help="the adapter's folder")
    generate.add_argument("--prompt", action="append", required=True, help="may be given several times")
    add_asking(generate, max_new_tokens=64)
    chat = add("chat", handlers.chat, "talk to a trained adapter")
    chat.add_argument("directory", metavar="DIR", help="the adapter's folder")
    chat.add_argument("--show-routing", action="store_true", help="colour tokens by the expert that counts most")
    chat.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    add_asking(chat, max_new_tokens=256)
    compose = add("compose", handlers.compose, "mix LoRA adapters that are already trained, without changing them")
    compose.add_argument("directory", metavar="OUT", help="new folder for the mixture; nothing is overwritten")
    compose.add_argument("--adapter", action="append", required=True, metavar="DIR", help="give one for each expert")
    compose.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapters name")
    compose.add_argument("--preset", default="arrow", metavar="NAME", help="how to mix them; default arrow")
    compose.add_argument("--shots", metavar="FILE", help="a few examples of the task, for --select and lorahub")
    compose.add_argument("--select", type=count, metavar="K", help="keep the K adapters that suit the examples best")
    compose.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=_FIELDS)
    add_export(add("export", handlers.export, "write an adapter in a form that needs no molora"), merging=False)
    add_export(add("merge", handlers.merge, "merge an adapter into its base model: export --as dense"), merging=True)
    add_eval(add("eval", handlers.evaluate, "score an adapter or a model, on rows or with lm-evaluation-harness"))
    add_prune(add("prune", handlers.prune, "make a trained mixture smaller"))
    add_serve(add("serve", handlers.serve, "serve mixtures and plain LoRAs with vLLM"))
    add_check_serving(add("check-serving", handlers.check_serving, "say whether vLLM answers as PyTorch does"))
    imports = add("import", handlers.import_adapter, "turn adapters of other libraries into one of molora")
    imports.add_argument(
        "directories", nargs="+", action=_AtLeastTwo, metavar="DIR", help="their folders, and last the new one, OUT"
    )
    imports.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapter names")
    imports.add_argument("--preset", metavar="NAME", help="how to mix several plain LoRAs")
    imports.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="for X-LoRA: where one of its LoRAs lies"
    )
    compare = add("compare", handlers.compare, "put trained adapters side by side")
    compare.add_argument("directories", nargs="+", metavar="RUN", help="folders; others are compared with the first")
    compare.add_argument("--output", metavar="FILE", help="write the numbers there too, as JSON")
    inspect = add("inspect", handlers.inspect, "show what an adapter's folder holds")
    inspect.add_argument("directory", metavar="DIR", help="the adapter's folder")
    add_report(add("report", handlers.report, "write a page about an adapter and its training"))
    add("presets", handlers.presets, "list the published methods a run file can start from")
    add("schema", handlers.schema, "print the JSON Schema of a run file")
    add("env", handlers.env, "print versions and settings, for bug reports")
    completion = add("completion", handlers.completion, "print a script that lets a shell complete all this")
    completion.add_argument("shell", choices=SHELLS, help='for bash: eval "$(molora completion bash)"')
    return parser, commands


class _Version(argparse.Action):
    """Print the installed version; looked up only when asked for, to keep start-up short."""

    def __init__(self, option_strings: Sequence[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"molora {version('molora')}")
        parser.exit()


class _AtLeastTwo(argparse.Action):
    """Take folders of which the last is to be written, and do not take the only one for it."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object
    ) -> None:
        if len(values) < 2:
            parser.error(
                f"got {values[0]!r} alone; name the adapter's folder and, right after it, the new one: "
                "molora import DIR OUT."
            )
        setattr(namespace, self.dest, values)
