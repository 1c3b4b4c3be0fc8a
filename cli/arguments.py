"""What may follow `molora` on the command line."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any

from molora_cli import handlers
from molora_cli.values import count as _count
from molora_cli.values import indices as _indices
from molora_cli.values import names as _names
from molora_cli.values import numbers as _numbers
from molora_cli.values import positive as _positive
from molora_cli.values import share as _share
from molora_cli.values import temperature as _temperature

_RUN_COMMANDS = {
    "train": (handlers.train, "train an adapter as a run file says"),
    "plan": (handlers.plan, "show what `train` would do, without training"),
}
_COMPOSE_OPTIONS = ("--base-model", "--adapter", "--preset", "--shots", "--select")
_TARGETS = "lora, experts or tasks (plain LoRAs), dense (a merged model), gguf-lora or gguf (for llama.cpp)"
_DTYPES = ("float32", "bfloat16", "float16")
_CALIBRATE = "rows to fit to, may be given several times; without FILE the data the adapter was trained on"
_FIELDS = "fields of the adapter to change: --key value, --key=value or key=value; top_k=3"
_OVERRIDES = "keys of the run file to change: --key value, --key=value or key=value; datasets.0.max_samples=10"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; the result has `handler` and that command's arguments.

    Raises:
        SystemExit: With 0 after printing help, with 2 after printing what is wrong.
    """
    parser, commands = _build()
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


def _build() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
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
    _add_asking(generate, max_new_tokens=64)
    chat = add("chat", handlers.chat, "talk to a trained adapter")
    chat.add_argument("directory", metavar="DIR", help="the adapter's folder")
    chat.add_argument("--show-routing", action="store_true", help="colour tokens by the expert that counts most")
    chat.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    _add_asking(chat, max_new_tokens=256)
    compose = add("compose", handlers.compose, "mix LoRA adapters that are already trained, without changing them")
    compose.add_argument("directory", metavar="OUT", help="new folder for the mixture; nothing is overwritten")
    compose.add_argument("--adapter", action="append", required=True, metavar="DIR", help="give one for each expert")
    compose.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapters name")
    compose.add_argument("--preset", default="arrow", metavar="NAME", help="how to mix them; default arrow")
    compose.add_argument("--shots", metavar="FILE", help="a few examples of the task, for --select and lorahub")
    compose.add_argument("--select", type=_count, metavar="K", help="keep the K adapters that suit the examples best")
    compose.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help=_FIELDS)
    _add_export(add("export", handlers.export, "write an adapter in a form that needs no molora"), merging=False)
    _add_export(add("merge", handlers.merge, "merge an adapter into its base model: export --as dense"), merging=True)
    _add_eval(add("eval", handlers.evaluate, "score an adapter or a model with lm-evaluation-harness"))
    _add_prune(add("prune", handlers.prune, "make a trained mixture smaller"))
    _add_serve(add("serve", handlers.serve, "serve mixtures and plain LoRAs with vLLM"))
    _add_check_serving(add("check-serving", handlers.check_serving, "say whether vLLM answers as PyTorch does"))
    imports = add("import", handlers.import_adapter, "turn adapters of other libraries into one of molora")
    imports.add_argument(
        "directories", nargs="+", action=_AtLeastTwo, metavar="DIR", help="their folders, and last the new one, OUT"
    )
    imports.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapter names")
    imports.add_argument("--preset", metavar="NAME", help="how to mix several plain LoRAs")
    imports.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR", help="for X-LoRA: where one of its LoRAs lies"
    )
    inspect = add("inspect", handlers.inspect, "show what an adapter's folder holds")
    inspect.add_argument("directory", metavar="DIR", help="the adapter's folder")
    _add_report(add("report", handlers.report, "write a page about an adapter and its training"))
    add("presets", handlers.presets, "list the published methods a run file can start from")
    add("schema", handlers.schema, "print the JSON Schema of a run file")
    add("env", handlers.env, "print versions and settings, for bug reports")
    return parser, commands


def _add_asking(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    parser.add_argument(
        "--max-new-tokens", type=_count, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    parser.add_argument("--temperature", type=_temperature, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--task", metavar="T", help="name or id of the task, if the adapter routes by it")
    parser.add_argument(
        "--scores",
        type=_numbers,
        metavar="N,N,...",
        help="a number per expert, if the adapter routes by them; --scores=-1,2",
    )


def _add_export(parser: argparse.ArgumentParser, merging: bool) -> None:
    """Add the arguments of `export`, which are those of `merge` too, where they concern a dense model."""
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    if not merging:
        parser.add_argument("--as", dest="target", required=True, metavar="WHAT", help=_TARGETS)
    fitting = parser.add_argument_group("adapters that route every token: the nearest plain LoRA")
    fitting.add_argument("--calibrate", action="append", nargs="?", const="", metavar="FILE", help=_CALIBRATE)
    fitting.add_argument("--method", metavar="NAME", help="uniform, usage, calibrated (default) or distilled")
    fitting.add_argument("--joint", action="store_true", help="fit block after block, on what earlier ones hand on")
    fitting.add_argument("--rows", type=_count, default=256, metavar="N", help="calibration rows; default 256")
    fitting.add_argument("--distill-steps", type=_count, default=60, metavar="N", help="for distilled; default 60")
    fitting.add_argument("--distill-learning-rate", type=_positive, default=2e-4, metavar="X", help="default 2e-4")
    fitting.add_argument("--score", action="append", default=[], metavar="FILE", help="rows to score tasks on")
    fitting.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="score no tasks")
    fitting.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw; default 0")
    fixing = parser.add_argument_group("adapters whose mixture is fixed by what they are given: exact")
    fixing.add_argument("--task", metavar="T", help="name or id of a task")
    fixing.add_argument("--scores", dest="expert_scores", type=_numbers, metavar="N,N,...", help="one per expert")
    fixing.add_argument("--prompt", metavar="TEXT", help="what follows this prompt")
    parser.add_argument("--rank", type=_count, metavar="R", help="cut the result down to this rank")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default the run's or the model's")
    if merging:
        parser.add_argument("--dequantize", action="store_true", help="undo the base model's quantisation and merge")
        return
    parser.add_argument("--bias", action="store_true", help="fit a constant per output too; PEFT alone loads it")
    parser.add_argument("--group-size", type=_count, metavar="N", help="for experts: how many in one LoRA")
    parser.add_argument("--dequantize", action="store_true", help="for dense: undo the base model's quantisation")
    parser.add_argument("--gguf-base", metavar="FILE", help="for gguf: a GGUF file of the base model")
    parser.add_argument("--outtype", metavar="TYPE", help="for gguf and gguf-lora: f32, f16, ...")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="folder of an adapter, molora's or PEFT's, or of a model")
    parser.add_argument("--tasks", type=_names, default=[], metavar="A,B,...", help="names of the harness's tasks")
    parser.add_argument("--include-path", metavar="P", help="folder with further task files")
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help="rows as `train` reads them")
    parser.add_argument("--limit", type=_count, metavar="N", help="rows of each task")
    parser.add_argument("--batch-size", type=_count, default=8, metavar="N", help="default 8")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--task", metavar="T", help="name or id of the task of all rows, if the adapter routes by it")
    parser.add_argument("--scores", type=_numbers, metavar="N,N,...", help="a number per expert, likewise")
    parser.add_argument("--output", metavar="FILE", help="write the scores there too, as JSON")


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    what = parser.add_argument_group("what to do, one of")
    what.add_argument("--below", type=_share, metavar="X", help="empty experts that a share below X of tokens selects")
    what.add_argument("--drop", type=_indices, metavar="N,N,...", help="remove these experts everywhere")
    what.add_argument("--keep-energy", type=_share, metavar="X", help="take out the ranks that contribute least")
    what.add_argument("--rank", type=_count, metavar="R", help="bring every expert down to rank R")
    what.add_argument("--merge-to", type=_count, metavar="N", help="make similar experts one, until N are left")
    parser.add_argument("--calibrate", action="append", nargs="?", const="", metavar="FILE", help=_CALIBRATE)
    parser.add_argument("--rows", type=_count, default=256, metavar="N", help="calibration rows; default 256")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="score no tasks")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw; default 0")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="folder of an adapter or a run, or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    rows = "rows to look at, may be given several times; default the run's evaluation rows"
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help=rows)
    parser.add_argument("--text", metavar="T", help="show its routing token by token; default a held-out row")
    parser.add_argument("--rows", type=_count, metavar="N", help="rows of each task; default 16")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--no-routing", dest="routing", action="store_false", help="run no rows, load no base model")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.usage = "molora serve DIR [DIR ...] [options] [-- VLLM ARGUMENTS]"
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="folder of an adapter, or NAME=DIR")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapters name")
    parser.add_argument("--dtype", default="auto", choices=("auto", *_DTYPES), help="default auto: the checkpoint's")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="default 127.0.0.1")
    parser.add_argument("--port", type=_count, default=8000, metavar="N", help="default 8000")
    parser.add_argument("--max-loras", type=_count, metavar="N", help="adapters in one batch; default all")
    parser.add_argument("--max-cpu-loras", type=_count, metavar="N", help="adapters kept in memory")
    parser.add_argument("--max-lora-rank", type=_count, metavar="R", help="default what the adapters need")
    parser.add_argument("--hot-load", action="store_true", help="let clients load and unload adapters while it runs")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and run nothing")


def _add_check_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder, molora's or PEFT's")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times; default six")
    parser.add_argument("--max-new-tokens", type=_count, default=24, metavar="N", help="default 24")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--dtype", choices=_DTYPES, help="on both sides; default float32, on GPUs float16")
    parser.add_argument("--tolerance", type=_positive, metavar="X", help="of a log-probability; by dtype")
    parser.add_argument("--tensor-parallel-size", type=_count, default=1, metavar="N", help="default 1")
    parser.add_argument("--url", metavar="URL", help="ask a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--name", metavar="NAME", help="what that server calls the adapter")


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
