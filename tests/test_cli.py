"""The command line: exit codes, messages instead of tracebacks, and a start that imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

import molora_cli
from molora.errors import ConfigError, DataError, MergeError, Problem, TargetModulesError
from molora.presets import PRESETS
from molora.runfile import RunFile
from molora_cli.arguments import parse

GOOD = """\
model_name_or_path: smollm2-135m-instruct
preset: adamole
target_modules: all-linear
datasets:
  - path: train.jsonl
output_dir: out
"""


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}\n")
    Path("run.yaml").write_text(GOOD)
    return "run.yaml"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict]:
    """Return a function that replaces `molora.commands.<name>.run` and records what it is called with."""

    def replace(name: str, result: int | BaseException = 0) -> dict:
        called: dict = {}

        def run(*args: object, **kwargs: object) -> int:
            called.update(args=args, kwargs=kwargs)
            if isinstance(result, BaseException):
                raise result
            return result

        module = types.SimpleNamespace(run=run)
        monkeypatch.setitem(sys.modules, f"molora.commands.{name}", module)
        monkeypatch.setattr(f"molora.commands.{name}", module, raising=False)
        return called

    return replace


def python(code: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["trian"], []])
def test_nothing_heavy_is_imported_before_a_command_runs(words: list[str]) -> None:
    code = (
        f"import sys, molora_cli; code = molora_cli.main({words!r})\n"
        "print([name for name in ('torch', 'peft', 'transformers', 'trl', 'pydantic') if name in sys.modules], code)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"[] {2 if words in (['trian'], []) else 0}"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name in (
        "train",
        "plan",
        "generate",
        "compose",
        "inspect",
        "presets",
        "schema",
        "env",
        "--version",
        "--debug",
    ):
        assert f" {name}" in printed


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "give the run file first"),
        (["train", "--max_steps", "3"], "give the run file first"),
        (["train", "a.yaml", "--config", "b.yaml"], "two files given, a.yaml and b.yaml"),
        (["train", "--config"], "--config needs a file"),
        (["generate", "out"], "--prompt"),
        (["generate", "out", "--prom", "hi"], "--prompt"),
        (
            ["generate", "out", "--prompt", "hi", "--max-new-tokens", "0"],
            "got '0'; must be a whole number of at least 1",
        ),
        (["generate", "out", "--prompt", "hi", "--temperature", "hot"], "got 'hot'; must be a number of at least 0"),
        (["generate", "out", "--prompt", "hi", "--scores", "0.1;2"], "got '0.1;2'; must be numbers with commas"),
        (["generate", "out", "--prompt", "hi", "--scores", "0.1,inf"], "must be numbers with commas"),
        (["inspect"], "DIR"),
        (["presets", "extra"], "extra"),
    ],
)
def test_usage_error(words: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(words) == 2
    captured = capsys.readouterr()
    assert fragment in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("name", ["train", "plan"])
@pytest.mark.parametrize(
    "words",
    [["run.yaml"], ["--config", "run.yaml"], ["--config=run.yaml"], ["--max_steps", "3", "--config", "run.yaml"]],
)
def test_run_file_in_every_position(name: str, words: list[str], run_yaml: str, command: Callable[..., dict]) -> None:
    called = command(name)
    assert molora_cli.main([name, *words, "--learning-rate", "1e-3", "r=2"]) == 0
    (run,) = called["args"]
    assert isinstance(run, RunFile)
    assert run.training["learning_rate"] == 1e-3
    assert run.adapter.r == 2
    assert run.training.get("max_steps") == (3 if "3" in words else None)


def test_generate_and_inspect_pass_their_arguments_on(command: Callable[..., dict]) -> None:
    called = command("generate")
    words = [
        "out",
        "--prompt",
        "a",
        "--prompt",
        "b",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0.5",
        "--base-model",
        "x",
        "--task",
        "sums",
        "--scores=-0.5,1",
    ]
    assert molora_cli.main(["generate", *words]) == 0
    assert called["args"] == ("out", ["a", "b"])
    assert called["kwargs"] == {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "base_model": "x",
        "task": "sums",
        "scores": [-0.5, 1.0],
    }
    called = command("generate")
    assert molora_cli.main(["generate", "out", "--prompt", "a"]) == 0
    nothing = dict.fromkeys(["base_model", "task", "scores"])
    assert called["kwargs"] == {"max_new_tokens": 64, "temperature": 0.0, **nothing}
    called = command("inspect")
    assert molora_cli.main(["inspect", "out"]) == 0
    assert called["args"] == ("out",)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError([Problem("r", "bad.", "run.yaml:3")]), 2, "invalid configuration:\n  - run.yaml:3: r: bad.\n"),
        (DataError("no rows in train.jsonl."), 2, "no rows in train.jsonl.\n"),
        (TargetModulesError("no module is called q_prj."), 2, "no module is called q_prj.\n"),
        (MergeError("cannot merge."), 2, "cannot merge.\n"),
        (
            RuntimeError("out of memory\nmany lines"),
            1,
            "molora: error: RuntimeError: out of memory (--debug shows where)\n",
        ),
        (KeyError(), 1, "molora: error: KeyError (--debug shows where)\n"),
        (KeyboardInterrupt(), 130, "molora: interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, command: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    command("inspect", error)
    assert molora_cli.main(["inspect", "out"]) == code
    assert capsys.readouterr().err == message


def test_a_command_chooses_its_own_exit_code(command: Callable[..., dict]) -> None:
    command("inspect", 1)
    assert molora_cli.main(["inspect", "out"]) == 1


@pytest.mark.parametrize("words", [["--debug", "inspect", "out"], ["inspect", "out", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], command: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    command("inspect", RuntimeError("boom"))
    assert molora_cli.main(words) == 1
    printed = capsys.readouterr().err
    assert "Traceback (most recent call last)" in printed
    assert printed.endswith("molora: error: RuntimeError: boom\n")


def test_mistakes_in_the_run_file(run_yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["train", run_yaml, "--max_steps", "2.5", "--learning_rte", "1"]) == 2
    printed = capsys.readouterr().err
    assert "run.yaml has 2 mistakes" in printed
    assert "command line: max_steps: got 2.5" in printed
    assert "Did you mean 'learning_rate'?" in printed
    assert "Traceback" not in printed


def test_a_real_process_reports_mistakes_without_traceback(run_yaml: str) -> None:
    code = "import sys, molora_cli; sys.exit(molora_cli.main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", "rum.yaml"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert "rum.yaml: no such file. Did you mean 'run.yaml'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_closed_pipe_is_silent() -> None:
    code = (
        "import sys, molora_cli\n"
        "from molora_cli import handlers\n"
        "def endless(_):\n"
        "    while True: print('x' * 1000)\n"
        "handlers.env = endless\n"
        "sys.exit(molora_cli.main(['env']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    assert errors == b""


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["preset", "router", "gate", "selection", "summary"]
    rows = [line for line in lines[1:] if line and not line.endswith(":")]
    assert [line.split()[0] for line in rows] == list(PRESETS)
    assert "\x1b" not in "".join(lines)


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "molora run file"


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_KERNELS", "torch")
    assert molora_cli.main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["kernels"] == "torch"
    assert {"molora", "torch", "transformers", "peft", "trl", "python", "platform", "cuda"} <= set(facts)


def test_debug_as_a_key_of_the_run_file_is_still_reachable() -> None:
    arguments: Namespace = parse(["train", "run.yaml", "debug=underflow_overflow"])
    assert arguments.overrides == ["debug=underflow_overflow"]


@pytest.mark.parametrize(
    ("broken", "error", "code"),
    [
        (True, ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'."), 2),
        (True, RuntimeError("operator torchvision::nms does not exist"), 2),
        (True, OSError("something else"), 1),
        (False, RuntimeError("something else"), 1),
    ],
)
def test_packages_for_images_that_break_every_import_are_named_with_the_remedy(
    broken: bool, error: Exception, code: int, command: Callable[..., dict], tmp_path, monkeypatch, capsys
) -> None:
    for name in ("torchvision", "torchaudio", "torchcodec"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if broken:
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('no nms')")
        monkeypatch.syspath_prepend(tmp_path)
    command("inspect", error)
    assert molora_cli.main(["inspect", "out"]) == code
    said = capsys.readouterr().err
    assert ("pip uninstall -y torchvision" in said) is (code == 2)
