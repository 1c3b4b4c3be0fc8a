"""References of the command line, from its parser, and of the run file, from the table of its keys."""

from __future__ import annotations

import argparse
import dataclasses

from generators.markdown import block, capital, code, page, paragraph, table
from molora.config_checks import _COUNTS, _NUMBERS, NAMES
from molora.runfile import keys
from molora.runfile.renamed import REFUSED, RENAMED, RENAMED_IN_DATASETS
from molora.runfile.values import describe
from molora_cli import arguments

_FIRST_FIELDS = {
    "preset": "The method",
    "r": "The experts",
    "target_modules": "Where they are",
    "router": "The router",
    "gate": "From logits to weights",
    "routing_losses": "Training the adapter",
}
"""The fields that parts of `MoLoraConfig` begin with, and the headings they get."""

_REPEATED = {"+": "{0} [{0} ...]", "*": "[{0} ...]", "?": "[{0}]"}
"""How an argument is written that may be given several times, or left out."""

_GROUPS = {
    keys.MODEL: "The base model",
    keys.DATA: "Data",
    keys.EVALUATION: "Evaluation",
    keys.RUN: "The run",
    keys.LAUNCH: "Processes",
}


def commands() -> str:
    """The page of every command and its options."""
    _, parsers = arguments.build()
    intro = (
        "Exit codes: 0 for success, 2 for a mistake in the command line, the run file or the data, 130 after Ctrl-C, "
        "1 for anything else. `--debug` shows the traceback of an error; `molora --version` is the version. "
        "Options are written in full. Nothing that exists is overwritten, unless a run file says `overwrite: true`."
    )
    names = [(f"[`{name}`](#molora-{name})", parser.description or "") for name, parser in parsers.items()]
    parts = [paragraph(intro), table(("command", "what it does"), names)]
    for name, parser in parsers.items():
        parts += [f"## molora {name}", paragraph(capital(f"{parser.description}.")), block(_usage(name, parser))]
        for group in parser._action_groups:
            rows = [_option(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                own = group.title not in ("positional arguments", "options")
                parts += [f"{capital(str(group.title))}:"] * own + [table(("argument", "meaning"), rows)]
    return page("Commands", *parts)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    if parser.usage:
        return parser.usage
    words, has_options = [f"molora {name}"], False
    for action in parser._actions:
        metavar = str(action.metavar or action.dest.upper())
        if not action.option_strings:
            words.append(_REPEATED.get(str(action.nargs), "{0}").format(metavar))
        elif action.required:
            words.append(f"{action.option_strings[-1]} {metavar}")
        else:
            has_options = has_options or action.dest != "help"
    return " ".join(words) + " [options]" * has_options


def _option(action: argparse.Action) -> tuple[str, str]:
    text = action.help or ""
    if not action.option_strings:
        return code(str(action.metavar or action.dest.upper())), text
    if action.choices:
        metavar = "{" + ",".join(map(str, action.choices)) + "}" if not action.metavar else str(action.metavar)
    else:
        metavar = str(action.metavar or action.dest.upper())
    value = "" if action.nargs == 0 else f" [{metavar}]" if action.nargs == "?" else f" {metavar}"
    names = ", ".join(action.option_strings)
    return code(names + value), text + "; required" * action.required


def config() -> str:
    """The page of every key of a run file, which are the fields of `MoLoraConfig` too."""
    known = keys.top_level_keys().values()
    intro = (
        "A run file holds these keys side by side. `molora train` and `molora plan` read it and refuse what they do "
        "not know, with its line. In Python `MoLoraConfig` has the fields of [the adapter](#the-adapter). `molora "
        "schema` prints all of it as JSON Schema, by which editors complete and check."
    )
    parts = [paragraph(intro)]
    for group, title in _GROUPS.items():
        parts += [f"## {title}", _keys([key for key in known if key.group == group])]
        if group == keys.DATA:
            parts += ["Each entry of `datasets`:", _keys(list(keys.dataset_keys().values()))]
    adapter = [key for key in known if key.group == keys.ADAPTER]
    starts = [index for index, key in enumerate(adapter) if key.name in _FIRST_FIELDS]
    parts += ["## The adapter", "Empty defaults depend on other fields, or mean that nothing is done."]
    for start, end in zip(starts, [*starts[1:], len(adapter)], strict=True):
        parts += [f"### {_FIRST_FIELDS[adapter[start].name]}", _keys(adapter[start:end])]
    return page("Run file and configuration", *parts, *_training(), *_refused())


def _training() -> list[str]:
    common = (
        *("output_dir", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "max_length", "warmup_steps", "lr_scheduler_type", "weight_decay"),
        *("max_grad_norm", "bf16", "fp16", "use_cpu", "activation_checkpointing", "eval_strategy", "logging_steps"),
        *("save_strategy", "save_steps", "resume_from_checkpoint", "report_to", "seed"),
    )
    known = keys.top_level_keys()
    text = (
        "Every other field of TRL's `SFTConfig`, and so of transformers' `TrainingArguments`, is a key too, with its "
        "name, type and default there. `molora schema` lists all. The usual ones:"
    )
    rows = [(f"`{name}`", describe(known[name].hint).replace("'", "`"), _default(known[name])) for name in common]
    return ["## Training", paragraph(text), table(("key", "value", "default"), rows)]


def _refused() -> list[str]:
    return [
        "## Keys that are refused",
        "Names of other programs and of older versions, and keys that would do nothing here; the message says so.",
        table(("key", "message"), [(f"`{name}`", text) for name, text in {**RENAMED, **REFUSED}.items()]),
        "In an entry of `datasets`:",
        table(("key", "message"), [(f"`{name}`", text) for name, text in RENAMED_IN_DATASETS.items()]),
    ]


def _keys(entries: list[keys.Key]) -> str:
    rows = [(f"`{key.name}`", _values(key), _default(key), meaning(key)) for key in entries]
    return table(("key", "value", "default", "meaning"), rows)


def meaning(key: keys.Key) -> str:
    """A key's help, without the names it may take."""
    names = ", ".join(f"`{name}`" for name in NAMES.get(key.name, ()))
    return key.help.replace(f": {names}.", ".") if names else key.help


def _values(key: keys.Key) -> str:
    """The values a key may have, in words."""
    if key.name == "preset":
        return "a [preset](../methods/README.md)"
    if key.name in NAMES:
        return ", ".join(f"`{name}`" for name in NAMES[key.name])
    text = describe(key.hint).replace("'", "`")
    least = _COUNTS.get(key.name, (0, False))[0]
    if key.name in _COUNTS:
        text = text.replace("whole number", f"whole number of at least {least}")
    if key.name in _NUMBERS:
        low, high, _ = _NUMBERS[key.name]
        bounds = [f"above {low:g}"] * (low > float("-inf")) + [f"up to {high:g}"] * (high < float("inf"))
        text = text.replace("a number", " ".join(["a number", *bounds]))
    return text


def _default(key: keys.Key) -> str:
    if key.default is dataclasses.MISSING:
        return "must be given"
    return "" if key.default is None else code(key.default)
