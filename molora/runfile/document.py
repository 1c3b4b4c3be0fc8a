"""YAML text to plain data that remembers the line of every value.

The reading differs from PyYAML's own in four ways, each of which hides a mistake there:

- numbers follow YAML 1.2, so `1e-4` is a number; dates, `1:30` and `1_000` are text;
- `on`, `off`, `yes` and `no` are text, only `true` and `false` are booleans;
- a key given twice is a mistake, at any level;
- a whole number with a leading zero (`08`, `010`) is a mistake: YAML versions disagree on what it is.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from molora.errors import ConfigError, Problem, did_you_mean

KeyPath = tuple[str | int, ...]

COMMAND_LINE = sys.maxsize
"""Stands for a line number where the value came from the command line; sorts after every line of the file."""

_TAG = "tag:yaml.org,2002:"
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with the scalar rules of the YAML 1.2 core schema, and merge keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own attribute, filled below


_NUMBER_STARTS = list("-+.0123456789")
for _kind, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"(?:{_pattern})$"), _starts)


@dataclass
class Document:
    """The data of one run file, the line of each value, and the mistakes found so far.

    Attributes:
        name: The file as the user named it.
        data: Nested dicts, lists and scalars; keys of dicts are always text.
        lines: Line of each value by its path; `COMMAND_LINE` if it was overridden there.
        mistakes: Line and problem, in the order found.
    """

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    mistakes: list[tuple[int, Problem]] = field(default_factory=list)

    def line(self, path: KeyPath) -> int:
        """Line of the value at `path`, or of the closest value around it; 0 if there is none."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return 0

    def where(self, path: KeyPath, line: int | None = None) -> str:
        """`file:line`, `command line`, or the file alone for a value that is not given."""
        line = self.line(path) if line is None else line
        if line == COMMAND_LINE:
            return "command line"
        return f"{self.name}:{line}" if line else self.name

    def report(self, path: KeyPath, message: str, line: int | None = None) -> None:
        """Note a mistake at `path`."""
        line = self.line(path) if line is None else line
        self.mistakes.append((line, Problem(dotted(path), message, self.where(path, line))))

    def raise_mistakes(self) -> None:
        """Raise all mistakes noted, in the order of their lines.

        Raises:
            ConfigError: If there is at least one.
        """
        if self.mistakes:
            problems = [problem for _, problem in sorted(self.mistakes, key=lambda mistake: mistake[0])]
            count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
            raise ConfigError(problems, f"{self.name} has {count}")


def dotted(path: KeyPath) -> str:
    """`datasets.0.path` for `("datasets", 0, "path")`."""
    return ".".join(map(str, path))


def read_document(path: str | os.PathLike[str]) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: If there is no such file, or it cannot be read as YAML at all. Smaller mistakes are only noted.
    """
    name = os.fspath(path)
    text = _read_text(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line, message = _explain(error, text)
        raise _unreadable(name, message, line) from None
    if node is None:
        raise _unreadable(name, "is empty; `molora schema` lists what it may contain.")
    if not isinstance(node, yaml.MappingNode):
        raise _unreadable(name, "must consist of `key: value` lines.", node.start_mark.line + 1)
    document = Document(name)
    document.data = _Builder(document).build(node, ())
    return document


def parse_value(document: Document, path: KeyPath, text: str) -> Any:
    """Read the value of a command-line override and note its lines.

    Raises:
        ValueError: With a sentence, if the text is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read {text!r}: {_explain(error, text)[1]}") from None
    document.lines = {known: line for known, line in document.lines.items() if known[: len(path)] != path}
    document.lines[path] = COMMAND_LINE
    return None if node is None else _Builder(document, COMMAND_LINE).build(node, path)


def _unreadable(name: str, message: str, line: int = 0) -> ConfigError:
    return ConfigError([Problem("", message, f"{name}:{line}" if line else name)], "cannot read the run file")


def _read_text(name: str) -> str:
    path = expand(name)
    if path.is_dir():
        raise _unreadable(name, "is a folder; give the YAML file inside it.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _unreadable(name, "no such file." + closest_file(path)) from None
    except OSError as error:
        raise _unreadable(name, f"{error.strerror}.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _unreadable(name, "is not UTF-8 text; save it as UTF-8.", line) from None


def expand(path: str | os.PathLike[str]) -> Path:
    """Replace a leading `~`; unlike `Path.expanduser`, leaves the name of an unknown user as it is."""
    return Path(os.path.expanduser(path))


def closest_file(path: Path) -> str:
    """Return a sentence naming the file in the same folder whose name is closest, or the missing folder."""
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r}."
    return did_you_mean(path.name, sorted(entry.name for entry in folder.iterdir()))


def _explain(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and reason of a YAML syntax error."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line, reason = error.problem_mark.line + 1, str(error.problem)
        if "'\\t'" in reason:
            return line, "a tab is not allowed here; indent with spaces."
        if "undefined alias" in reason or "alphabetic or numeric" in reason:
            return line, "not valid YAML: text that starts with * or & must be in quotes."
        if "cannot start any token" in reason:
            return line, f"not valid YAML: {reason}; put the text in quotes."
        if "expected a single document" in f"{error.context} {reason}":
            return line, "a second document starts here; a run file holds one."
        return line, f"not valid YAML: {reason}."
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position) + 1, "contains a control character; remove it."


class _Builder:
    """Turns YAML nodes into data, noting lines and mistakes in a document."""

    def __init__(self, document: Document, line: int | None = None):
        self.document = document
        self.fixed_line = line
        self.open: list[yaml.Node] = []

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if any(node is outer for outer in self.open):
            self.report(path, "contains itself.", node)
            return None
        self.open.append(node)
        value = self.sequence(node, path) if isinstance(node, yaml.SequenceNode) else self.mapping(node, path)
        self.open.pop()
        return value

    def line(self, node: yaml.Node) -> int:
        return self.fixed_line or node.start_mark.line + 1

    def report(self, path: KeyPath, message: str, node: yaml.Node) -> None:
        self.document.report(path, message, self.line(node))

    def sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.document.lines[(*path, index)] = self.line(item)
            values.append(self.build(item, (*path, index)))
        return values

    def mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(path, "a key must be a plain word.", key_node)
                continue
            here = (*path, key_node.value)
            if key_node.value in values:
                first = "" if self.fixed_line else f", first in line {self.document.lines[here]}"
                self.report(here, f"given twice{first}.", key_node)
                continue
            self.document.lines[here] = self.line(key_node)
            values[key_node.value] = self.build(value_node, here)
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                self.report(path, "`<<` takes a mapping.", source)
                continue
            for key, value in self.build(source, (*path, "<<")).items():
                self.document.lines.setdefault((*path, key), self.document.lines[(*path, "<<", key)])
                values.setdefault(key, value)
        return values

    def scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "int" and _LEADING_ZERO.fullmatch(text):
            self.report(path, f"got {text}; write {int(text)}, or '{text}' in quotes if it is text.", node)
        try:
            match kind:
                case "str" | "merge":
                    return text
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, 0 if text[:2] in ("0o", "0x") else 10)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            pass
        self.report(path, f"the YAML tag of {text!r} is not supported; leave it out.", node)
        return text
