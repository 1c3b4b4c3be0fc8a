"""Where mixtures should shine: tasks one after the other, a task added later, scarce tasks, composed adapters.

    python -m benchmarks.quality.continual --tasks FOLDER --out FOLDER --task_names A,B,C --study sequence,added

Tasks are learned in the order of `--task_names`. A run that is finished is not run again. Learning rates are not tuned
here: see `benchmarks/quality/studies.py`, or give `--learning_rates`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import datetime
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.quality.arms import read_arms
from benchmarks.quality.bench import Session
from benchmarks.quality.continual_tables import SUMMARIES, TEXTS
from benchmarks.quality.data import found_tasks, load_rows
from benchmarks.quality.jobs import Bench, Job
from benchmarks.quality.options import numbers, rates, words
from benchmarks.quality.pool import Pool, Work
from benchmarks.quality.studies import STUDIES, Parts, jobs_of
from molora.errors import MoloraError
from molora.writing import new_file


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.continual",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--tasks", type=Path, required=True, metavar="FOLDER", help="holds train/ and test/TASK.jsonl")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="runs and results go there")
    made.add_argument("--task_names", type=words, metavar="A,B", help="in the order of learning; default: all, sorted")
    made.add_argument(
        "--study", type=words, default=["sequence"], metavar="A,B", help=f"of {', '.join(STUDIES)}; default: sequence"
    )
    made.add_argument("--arms", type=words, metavar="A,B", help="default: all of the study")
    made.add_argument(
        "--arms_file", type=Path, metavar="FILE", help="other fields for lora, molora, grown; YAML, JSON"
    )
    made.add_argument("--model", default="smollm2-135m-instruct", help="the base model")
    made.add_argument("--steps", type=int, default=16, help="of each task")
    made.add_argument("--batch_size", type=int, default=8)
    made.add_argument("--max_length", type=int, default=128, help="tokens; longer training rows are left out")
    made.add_argument("--validation", type=int, default=40, help="rows a task that are not trained on")
    made.add_argument("--test_rows", type=int, default=150, help="the last so many rows of each test file")
    made.add_argument("--scarce_rows", type=int, default=16, help="rows of the scarce task")
    made.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="0,1,2")
    made.add_argument(
        "--learning_rates", type=rates, default={}, metavar="ARM=RATE,...", help="instead of the usual ones"
    )
    made.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the base; default: bfloat16 on cuda")
    made.add_argument("--report_only", action="store_true", help="tables of the runs there are")
    return made


def run(given: argparse.Namespace) -> int:
    """Do the studies and write their results.

    Returns:
        The exit status.

    Raises:
        MoloraError: Something that was given cannot be used.
    """
    _check(given)
    session, jobs = _prepare(given)
    try:
        results = list(itertools.chain(*session.results(jobs)))
    finally:
        session.pool.close()
    _write(session, results)
    for name in session.missing:
        print(f"not run yet: {name}")
    for name, error in session.failed.items():
        print(f"\nFAILED {name}:\n{error}", file=sys.stderr)
    return int(bool(session.failed))


def _check(given: argparse.Namespace) -> None:
    import torch

    for name in ("steps", "max_length", "validation", "test_rows", "workers", "scarce_rows"):
        if getattr(given, name) < 1:
            raise MoloraError(f"--{name}: got {getattr(given, name)}; must be at least 1.")
    if given.batch_size < 2:
        raise MoloraError(
            f"--batch_size: got {given.batch_size}; must be at least 2, as replay mixes old and new rows."
        )
    if not given.seeds or not given.study:
        raise MoloraError("--seeds and --study: give at least one each.")
    if given.scarce_rows > given.steps * given.batch_size:
        most = given.steps * given.batch_size
        raise MoloraError(f"--scarce_rows: got {given.scarce_rows}; a task has {most} rows (--steps x --batch_size).")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise MoloraError("--device cuda: torch finds no CUDA device; use --device cpu.")


def _prepare(given: argparse.Namespace) -> tuple[Session, list[Job]]:
    """Read everything, so that mistakes show before the first run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from molora.base import ensure_pad_token, resolve_base

    known = read_arms(given.arms_file)
    path = resolve_base(given.model)
    config = AutoConfig.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ensure_pad_token(tokenizer, int(config.get_text_config().vocab_size))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = found_tasks(given.tasks, given.task_names)
    if len(names) < 2:
        raise MoloraError(f"got the task {names[0]!r} alone; give at least two, one after the other.")
    parts = Parts(known, skeleton, len(names), given.seeds, given.learning_rates, given.scarce_rows)
    jobs = jobs_of(given.study, parts, given.arms)
    rows = load_rows(
        given.tasks, names, tokenizer, per_task=given.steps * given.batch_size, max_length=given.max_length,
        validation=given.validation, test_rows=given.test_rows,
    )  # fmt: skip
    dtype = given.dtype or ("bfloat16" if given.device == "cuda" else "float32")
    bench = Bench(
        given.model, dtype, given.device, rows.names, rows.digest, given.steps, given.batch_size, given.max_length,
        given.validation, given.test_rows,
    )  # fmt: skip
    shared = Work(bench, rows, given.out / "runs", int(tokenizer.pad_token_id))
    arms = list({id(job.arm): job.arm for job in jobs}.values())
    return Session(given, shared, arms, Pool(shared, given.workers)), jobs


def _write(session: Session, results: Sequence[Mapping[str, Any]]) -> None:
    """Write tables and JSON under a name that is not taken, and print the tables."""
    import torch

    given, bench = session.given, session.work.bench
    gpu = {"gpu": torch.cuda.get_device_name()} if given.device == "cuda" else {}
    where = report.machine(1) | gpu | {"workers": given.workers}
    versions = report.versions()
    studies = {study: [run for run in results if run["settings"]["kind"] == study] for study in given.study}
    heading = (
        f"{bench.model} in {bench.dtype}; tasks in this order: {', '.join(bench.tasks)}; {bench.steps} steps of "
        f"{bench.batch_size} rows a task; {bench.test_rows} test rows a task. {where.get('gpu', where['cpu'])}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    texts = [TEXTS[study](runs) for study, runs in studies.items() if runs]
    text = "\n\n".join(["# Mixtures and LoRA over time", heading, *texts]) + "\n"
    content = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": where,
        "versions": versions,
        "settings": vars(bench) | {"seeds": given.seeds, "studies": given.study},
        "summaries": {study: SUMMARIES[study](runs) for study, runs in studies.items() if runs},
        "runs": studies,
        "failed": session.failed,
        "missing": session.missing,
    }
    stem = _free_name(given.out)
    with new_file(given.out / f"{stem}.json") as partial:
        partial.write_text(json.dumps(content, indent=1, default=vars) + "\n", encoding="utf-8")
    with new_file(given.out / f"{stem}.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)
    print(f"Written: {given.out / stem}.json and .md.")


def _free_name(folder: Path) -> str:
    """The first of `continual`, `continual-2`, ... that no file has: earlier results stay."""
    names = itertools.chain(["continual"], (f"continual-{number}" for number in itertools.count(2)))
    return next(name for name in names if not any((folder / f"{name}.{end}").exists() for end in ("json", "md")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 1 if a run failed or something was wrong."""
    try:
        return run(parser().parse_args(arguments))
    except MoloraError as error:
        print(f"continual: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
