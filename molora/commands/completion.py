"""`molora completion`: a script by which a shell completes commands, options, keys, files and names of methods."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping

import shtab

from molora.presets import available_presets
from molora.runfile.keys import top_level_keys

FOLDERS = ("directory", "directories", "out", "adapters", "include_path")
"""What names a folder, by its place in the parsed arguments; further words that take a value may name a file."""

FILES = ("file", "data", "calibrate", "shots", "gguf_base", "output")


def run(shell: str, parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> int:
    """Print the script.

    Args:
        shell: One of shtab's shells.
        parser: The parser of the command line, which gets what only the script needs.
        commands: Those of its commands, by name.
    """
    for name in ("train", "plan"):
        _add_keys(commands[name])
    for action in _actions(commands.values()):
        if action.dest == "preset" and action.choices is None:
            action.choices = available_presets()
        elif action.dest in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]  # where shtab looks
        elif action.dest in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, shell=shell))
    return 0


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """Any key of the run file may be overridden; the parser itself takes them as words."""
    for name, key in top_level_keys().items():
        if name != "datasets":
            parser.add_argument(f"--{name}", metavar="VALUE", help=_first_sentence(key.help))


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".").replace("%", "%%")


def _actions(parsers: Iterable[argparse.ArgumentParser]) -> Iterator[argparse.Action]:
    for parser in parsers:
        yield from parser._actions
