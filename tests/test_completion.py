"""`molora completion`: scripts that shells accept, and what bash offers with one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import molora_cli
from molora.presets import available_presets
from molora_cli.arguments import SHELLS, build

CASES = {
    "commands": (["molora", "ge"], {"generate"}),
    "options": (["molora", "chat", "x", "--show"], {"--show-routing"}),
    "keys of the run file": (["molora", "train", "run.yaml", "--learning_r"], {"--learning_rate"}),
    "presets": (["molora", "init", "--preset", "ada"], {"adamoe", "adamole"}),
    "folders": (["molora", "inspect", "ru"], {"runs"}),
    "files": (["molora", "eval", "runs", "--data", "ro"], {"rows.jsonl"}),
}


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("sys.stdout.write", written.append)
        assert molora_cli.main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "molora.bash"
    path.write_text("".join(written))
    return path


@pytest.mark.parametrize(("words", "offered"), CASES.values(), ids=CASES)
def test_bash_offers_what_may_follow(words: list[str], offered: set[str], bash_script: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "rows.jsonl").touch()
    listed = " ".join(f"'{word}'" for word in words)
    code = (
        f'source {bash_script}; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; COMP_LINE="${{COMP_WORDS[*]}}"; '
        "COMP_POINT=${#COMP_LINE}; _shtab_molora; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert set(result.stdout.split()) == offered, result.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_with_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert not [name for name in build()[1] if name not in script]
    assert all(name in script for name in ("learning_rate", *available_presets()[:3]))
    checker = shutil.which({"bash": "bash", "zsh": "zsh", "fish": "fish"}.get(shell, "-"))
    if checker:
        assert subprocess.run([checker, "-n"], input=script, text=True, timeout=60).returncode == 0


def test_an_unknown_shell_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert molora_cli.main(["completion", "korn"]) == 2
    assert "'bash', 'zsh'" in capsys.readouterr().err
