"""The fenced blocks of the pages written by hand, the commands in them, and what can be said of those without running.

A plain block, or one in `bash` or `sh`, holds commands and comments. Everything else that is only looked at, such as
output, is in `text`.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import os
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
MARK = "<!-- Written by docs/generate.py"
_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^\s`]*)\s*$")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, its language, and its text without the fences."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages_by_hand() -> list[str]:
    """Paths from the repository's root; what docs/generate.py writes is tested in test_docs_reference.py."""
    docs = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    pages = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *docs]
    return [page for page in pages if not (ROOT / page).read_text(encoding="utf-8").startswith(MARK)]


def blocks_of(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in their order; those of some languages, or all."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for block in read_blocks(page, text) if not languages or block.language in languages]


def read_blocks(page: str, text: str) -> Iterator[Block]:
    """Read a page.

    Raises:
        ValueError: If a block has no end.
    """
    start, fence, language, inside = 0, "", "", []
    for number, line in enumerate(text.splitlines(), 1):
        match = _FENCE.match(line)
        if not fence:
            if match:
                start, fence, language, inside = number, match[2], match[3], []
        elif match and match[2].startswith(fence) and not match[3]:
            yield Block(page, start, language, textwrap.dedent("\n".join(inside) + "\n"))
            fence = ""
        else:
            inside.append(line)
    if fence:
        raise ValueError(f"{page}:{start}: the block has no end.")


def commands_of(text: str) -> list[list[str]]:
    """The commands of a block as lists of words, without comments.

    A command goes on after a backslash and within quotes. `molora presets | schema` are two of them.

    Raises:
        ValueError: If a quote is not closed.
    """
    found, pending = [], ""
    for line in text.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote that goes on in the next line
            pending += "\n"
            continue
        pending = ""
        if "|" in words:
            found += [[words[0], word] for word in words[1:] if word != "|"]
        elif words:
            found.append(words)
    if pending.strip():
        raise ValueError(f"unfinished command: {pending!r}")
    return found


def check_command(words: Sequence[str]) -> None:
    """Say what is wrong with a command that is not molora's, as far as that can be known without running it.

    Raises:
        AssertionError: If a target, option, extra, pin or file does not exist, or nothing here knows the program.
    """
    program, rest = Path(words[0]).name, list(words[1:])
    checks = {"make": _check_make, "pip": _check_pip, "curl": _check_curl}
    if program in checks:
        checks[program](rest)
    elif program.startswith("python"):
        _check_python(rest)
    elif program == "source":
        assert rest == [".venv/bin/activate"], rest
    else:
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no program that the test knows, nor a file here"


def _project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    markers = {line.partition(":")[0] for line in _project()["tool"]["pytest"]["ini_options"]["markers"]}
    for word in words:
        name, given, value = word.partition("=")
        if not given:
            assert name in targets, f"the Makefile has no target {name!r}"
            continue
        assert f"$({name})" in makefile, f"the Makefile reads no {name}"
        options = shlex.split(value)
        named = [marker for option, marker in itertools.pairwise(options) if option == "-m"]
        assert set(named) <= markers, f"pytest knows the markers {markers}"


def _check_pip(words: list[str]) -> None:
    assert words[0] in ("install", "uninstall"), words
    given = iter(words[1:])
    for word in given:
        if word in ("-r", "-c"):
            assert (ROOT / next(given)).is_file()
        elif not word.startswith("-"):
            _check_requirement(word)


def _check_requirement(word: str) -> None:
    """molora with extras there are, a version that is pinned here, or a package that is named here without one."""
    project = _project()["project"]
    extras = project["optional-dependencies"]
    name, version = re.fullmatch(r"([\w.-]+)(?:\[.*\])?(?:==(.*))?", word).groups()
    asked = re.findall(r"[\w-]+", word[word.index("[") :]) if "[" in word else []
    if name in ("molora", "."):
        assert set(asked) <= set(extras), f"the extras are {sorted(extras)}"
        return
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    listed = [*pinned, *project["dependencies"], *(line for group in extras.values() for line in group)]
    if version is not None:
        assert f"{name}=={version}" in listed, f"{word} is pinned otherwise, or not at all"
        return
    named = "\n".join([*listed, *((ROOT / place).read_text(encoding="utf-8") for place in _PLACES_OF_PACKAGES)])
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", named), f"nothing here names the package {name}"


_PLACES_OF_PACKAGES = ("Makefile", "tests/serving/setup.sh", "configs/accelerate/zero2.yaml")


def _check_curl(words: list[str]) -> None:
    assert any(re.match(r"http://127\.0\.0\.1:8000/v1/", word) for word in words), words
    if "-d" in words:
        assert json.loads(words[words.index("-d") + 1])


def _check_python(words: list[str]) -> None:
    """A module of the benchmarks with its options, pytest on files there are, or a script with options it reads."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file(), words[0]
        known = _strings_of(ROOT / words[0])
        assert {word for word in words[1:] if word.startswith("-")} <= known, words
        return
    module, rest = words[1], words[2:]
    if module.startswith("benchmarks"):
        found = importlib.import_module(module)
        if not hasattr(found, "parser"):
            found = importlib.import_module(f"{module}.__main__")
        assert found.parser().parse_args(rest)
    elif module == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif module == "vllm.entrypoints.openai.api_server":
        known = _strings_of(ROOT / "molora/serving/launch.py")
        assert {module, *(word.removeprefix("--") for word in rest if word.startswith("-"))} <= known
    else:
        assert module == "venv", f"no check for `python -m {module}`"


def _strings_of(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


_NODE = r"\w+(?:\[\".*?\"\]|\(\(\".*?\"\)\))?"


def check_drawing(text: str) -> None:
    """A flow chart of Mermaid: nodes, and arrows between them. GitHub draws it.

    Raises:
        AssertionError: If a line is neither.
    """
    first, *lines = text.splitlines()
    assert re.fullmatch(r"flowchart (LR|TB)", first), first
    wrong = [line for line in lines if not re.fullmatch(rf"\s+{_NODE}(?: --> {_NODE})*", line)]
    assert not wrong, wrong


def is_whole(content: dict) -> bool:
    """Whether YAML is a run file, and not keys to put into one."""
    return "model_name_or_path" in content


def yaml_of(block: Block) -> dict:
    """What a block in `yaml` holds."""
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict), f"{block} holds no keys"
    return content
