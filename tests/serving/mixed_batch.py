"""Base model, plain LoRA and mixtures in one batch: `python mixed_batch.py WORK [--tensor-parallel-size 2]`.

Greedy texts must be those of PyTorch, and log-probabilities the same but for rounding; a reference that routes wrongly
must be told apart. Then the same with fewer slots than adapters, so that slots are written over and over.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checks import Answer, Reference, Report, compare, read_reference

from molora.serving.launch import cpu_environment
from molora.serving.machine import this_machine

ENGINE = Path(__file__).with_name("engine.py")
MAX_LORA_RANK = 64
Batch = list[tuple[str, int]]


def run_engine(job: dict[str, Any], environment: dict[str, str] | None = None) -> tuple[dict[str, Any], str]:
    """Let an engine in a process of its own do a job: what it answered, and what it printed."""
    processes = {"tensor-parallel-size": str(job["engine"].get("tensor_parallel_size", 1))}
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        **cpu_environment(this_machine(), processes),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; enough, where others need memory too
    }
    with tempfile.TemporaryDirectory() as folder:
        given, out, log = (Path(folder) / name for name in ("job.json", "out.json", "log"))
        given.write_text(json.dumps(job))
        with log.open("w") as output:
            subprocess.run(
                # -P: the folder of the script is no place to import from.
                [sys.executable, "-P", str(ENGINE), str(given), str(out)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **settings, **(environment or {})},
                check=False,  # an engine that failed has said why
            )
        said = log.read_text(errors="replace")
        found = json.loads(out.read_text()) if out.exists() else {"error": said[-2000:]}
    return found, said


def engine_options(reference: Reference, slots: int, requests: int, processes: int) -> dict[str, Any]:
    return {
        "model": reference.base,
        "dtype": "float32",
        "enforce_eager": True,
        "tensor_parallel_size": processes,
        "enable_lora": True,
        "max_loras": slots,
        # Some adapters are read again from disk, others only copied into a slot again.
        "max_cpu_loras": max(slots, len(reference.adapters) - 1),
        "max_lora_rank": MAX_LORA_RANK,
        "max_model_len": 256,
        "max_num_seqs": requests,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": True,
        "block_size": 32,  # the smallest on CPUs; else no prompt of ours would fill one
    }


def serve(report: Report, reference: Reference, slots: int, processes: int) -> None:
    """Ask everything at once, twice, and backwards."""
    names = list(reference.runs)
    batch: Batch = [(name, prompt) for prompt in range(len(reference.prompts)) for name in names]
    job: dict[str, Any] = {
        "engine": engine_options(reference, slots, len(batch), processes),
        "adapters": reference.adapters,
        "prompts": reference.prompts,
        "new_tokens": reference.new_tokens,
        "rounds": [batch, batch, batch[::-1]],
    }
    found, said = run_engine(job)
    how = f"{slots} slots for {len(reference.adapters)} adapters, {processes} process{'es' * (processes > 1)}"
    if "error" in found:
        print(said[-6000:])  # noqa: T201  # in the log of a job this is all there is to go by
        report.line(False, f"{how}: {found['error']}")
        return
    report.line(len(batch) >= 20, f"{how}: {len(batch)} requests in one batch")
    for number, (asked, answers) in enumerate(zip(job["rounds"], found["rounds"], strict=True), 1):
        for name in names:
            agreement = compare(*_of(name, asked, answers, reference.runs[name]))
            report.line(agreement.is_exact, f"{how}, round {number}, {name}: {agreement}")
    report.line(found["cached"][1] > 0, f"{how}: round 2 took {found['cached'][1]} tokens from the prefix cache")
    for what, wrong in reference.controls.items():
        agreement = compare(*_of(what.partition(":")[0], batch, found["rounds"][0], wrong))
        report.line(agreement.is_different, f"{how}, must differ from {what}: {agreement}")


def _of(
    name: str, asked: Batch, answers: Sequence[Answer], references: Sequence[Answer]
) -> tuple[list[Answer], list[Answer]]:
    """The answers of one adapter, and what they are compared with."""
    mine = [(answer, references[prompt]) for (who, prompt), answer in zip(asked, answers, strict=True) if who == name]
    return [answer for answer, _ in mine], [reference for _, reference in mine]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    arguments = parser.parse_args()
    processes = arguments.tensor_parallel_size
    reference = read_reference(arguments.work.absolute() / ("small" if processes == 1 else "tiny"))
    report = Report("mixed batch" if processes == 1 else f"mixed batch on {processes} processes")
    for slots in (len(reference.adapters), 2) if processes == 1 else (3,):
        serve(report, reference, slots, processes)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
