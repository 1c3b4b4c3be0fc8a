"""What is installed is what lies in the folders: a package that is forgotten works in a checkout and nowhere else."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_every_package_is_installed() -> None:
    inside = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "molora").rglob("__init__.py")}
    elsewhere = {name for name in SETTINGS["package-dir"] if name != "molora"}
    assert set(SETTINGS["packages"]) == inside | elsewhere
    assert all((ROOT / SETTINGS["package-dir"][name] / "__init__.py").is_file() for name in elsewhere)
