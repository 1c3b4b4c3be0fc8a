"""What must be refused: `python broken.py WORK`.

A server is asked to load folders that are damaged, incomplete, of a newer format, or cannot be served; it must say
which folder and why, and answer on. And without the plug-in vLLM must refuse a mixture, not serve it unrouted.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from broken_folders import CASES
from checks import Answer, Reference, Report, compare, read_reference
from mixed_batch import run_engine
from server import Refused, Server

MIXTURE = "adamole"
RANK = 16
"""Room for the mixture, which takes 13, and not for what is too wide."""

FIRST = 4


def refuse(report: Report, reference: Reference, folder: Path, log: Path) -> None:
    """Let a server load everything that is broken."""
    good = {name: Path(reference.adapters[name]) for name in (MIXTURE, "lora")}
    options = ["--max-lora-rank", str(RANK), "--max-loras", "2"]
    with Server(reference.base, {name: str(path) for name, path in good.items()}, log, options) as server:

        def answers() -> list[Answer]:
            return [server.ask(name, prompt, FIRST) for name in (server.base, MIXTURE) for prompt in reference.prompts]

        right = [answer for name in ("base", MIXTURE) for answer in reference.runs[name]]
        before = compare(answers(), right, FIRST)
        report.line(before.is_exact, f"before: {before}")
        for case in CASES:
            case.make(folder / case.name, good[MIXTURE], Path(reference.base))
            said = _load(server, case.name, folder / case.name)
            missing = [part for part in (case.name, *case.says) if part not in said]
            lost = f"; it does not say {', '.join(map(repr, missing))}" if missing else ""
            report.line(not missing, f"{case.name} is refused: {said}{lost}")
            after = compare(answers(), right, FIRST)
            report.line(after.is_exact, f"after {case.name}: {after}")
        listed = set(server.models()) - {server.base, reference.base}
        report.line(listed == set(good), f"none of them is listed; there are {', '.join(sorted(listed))}")


def _load(server: Server, name: str, folder: Path) -> str:
    """What the server says against a folder; nothing if it loads it."""
    try:
        server.load(name, folder)
    except Refused as error:
        return error.said
    server.unload(name)
    return ""


def without_plugin(report: Report, reference: Reference) -> None:
    """Let a vLLM load a mixture that does not know molora; and then the same vLLM a plain LoRA."""
    job: dict[str, Any] = {
        "engine": {
            "model": reference.base,
            "dtype": "float32",
            "enforce_eager": True,
            "enable_lora": True,
            "max_lora_rank": RANK,
            "max_model_len": 256,
            "max_num_seqs": 4,
        },
        "prompts": reference.prompts,
        "new_tokens": FIRST,
    }
    for name, is_refused in ((MIXTURE, True), ("lora", False)):
        rounds = [[(name, prompt) for prompt in range(len(reference.prompts))]]
        asked = job | {"rounds": rounds, "adapters": {name: reference.adapters[name]}}
        found, _ = run_engine(asked, {"VLLM_PLUGINS": ""})
        said = found.get("error", "it answers")
        good = "molora" in said if is_refused else "error" not in found
        report.line(good, f"without the plug-in, {name} is {'refused' if is_refused else 'served'}: {said}")


def main(work: Path) -> int:
    report = Report("broken")
    reference = read_reference(work / "tiny")
    with tempfile.TemporaryDirectory() as folder:
        refuse(report, reference, Path(folder), work / "broken.log")
    without_plugin(report, reference)
    return report.end()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute()))
