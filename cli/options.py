"""The options of the commands that have many."""

from __future__ import annotations

import argparse

from molora_cli.values import count, indices, names, numbers, positive, share, temperature

_TARGETS = "lora, experts or tasks (plain LoRAs), dense (a merged model), gguf-lora or gguf (for llama.cpp)"
_DTYPES = ("float32", "bfloat16", "float16")
_CALIBRATE = "rows to fit to, may be given several times; without FILE the data the adapter was trained on"


def add_asking(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Of `generate` and `chat`."""
    parser.add_argument(
        "--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    parser.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="default 0: greedy")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--task", metavar="T", help="name or id of the task, if the adapter routes by it")
    parser.add_argument(
        "--scores",
        type=numbers,
        metavar="N,N,...",
        help="a number per expert, if the adapter routes by them; --scores=-1,2",
    )


def add_export(parser: argparse.ArgumentParser, merging: bool) -> None:
    """Add the arguments of `export`, which are those of `merge` too, where they concern a dense model."""
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    if not merging:
        parser.add_argument("--as", dest="target", required=True, metavar="WHAT", help=_TARGETS)
    fitting = parser.add_argument_group("adapters that route every token: the nearest plain LoRA")
    fitting.add_argument("--calibrate", action="append", nargs="?", const="", metavar="FILE", help=_CALIBRATE)
    fitting.add_argument("--method", metavar="NAME", help="uniform, usage, calibrated (default) or distilled")
    fitting.add_argument("--joint", action="store_true", help="fit block after block, on what earlier ones hand on")
    fitting.add_argument("--rows", type=count, default=256, metavar="N", help="calibration rows; default 256")
    fitting.add_argument("--distill-steps", type=count, default=60, metavar="N", help="for distilled; default 60")
    fitting.add_argument("--distill-learning-rate", type=positive, default=2e-4, metavar="X", help="default 2e-4")
    fitting.add_argument("--score", action="append", default=[], metavar="FILE", help="rows to score tasks on")
    fitting.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="score no tasks")
    fitting.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw; default 0")
    fixing = parser.add_argument_group("adapters whose mixture is fixed by what they are given: exact")
    fixing.add_argument("--task", metavar="T", help="name or id of a task")
    fixing.add_argument("--scores", dest="expert_scores", type=numbers, metavar="N,N,...", help="one per expert")
    fixing.add_argument("--prompt", metavar="TEXT", help="what follows this prompt")
    parser.add_argument("--rank", type=count, metavar="R", help="cut the result down to this rank")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default the run's or the model's")
    if merging:
        parser.add_argument("--dequantize", action="store_true", help="undo the base model's quantisation and merge")
        return
    parser.add_argument("--bias", action="store_true", help="fit a constant per output too; PEFT alone loads it")
    parser.add_argument("--group-size", type=count, metavar="N", help="for experts: how many in one LoRA")
    parser.add_argument("--dequantize", action="store_true", help="for dense: undo the base model's quantisation")
    parser.add_argument("--gguf-base", metavar="FILE", help="for gguf: a GGUF file of the base model")
    parser.add_argument("--outtype", metavar="TYPE", help="for gguf and gguf-lora: f32, f16, ...")


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Of `eval`."""
    parser.add_argument("directory", metavar="DIR", help="folder of an adapter, molora's or PEFT's, or of a model")
    parser.add_argument("--tasks", type=names, default=[], metavar="A,B,...", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", metavar="P", help="folder with further task files")
    rows = "rows as `train` reads them, may be given several times; default the run's evaluation rows"
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help=rows)
    parser.add_argument("--no-base", dest="base", action="store_false", help="score rows with the adapter only")
    parser.add_argument("--max-new-tokens", type=count, metavar="N", help="of an answer; default the run's, or 64")
    parser.add_argument("--limit", type=count, metavar="N", help="rows of each task")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="default 8")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--task", metavar="T", help="name or id of the task of all rows, if the adapter routes by it")
    parser.add_argument("--scores", type=numbers, metavar="N,N,...", help="a number per expert, likewise")
    parser.add_argument("--output", metavar="FILE", help="write the scores there too, as JSON")


def add_prune(parser: argparse.ArgumentParser) -> None:
    """Of `prune`."""
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    what = parser.add_argument_group("what to do, one of")
    what.add_argument("--below", type=share, metavar="X", help="empty experts that a share below X of tokens selects")
    what.add_argument("--drop", type=indices, metavar="N,N,...", help="remove these experts everywhere")
    what.add_argument("--keep-energy", type=share, metavar="X", help="take out the ranks that contribute least")
    what.add_argument("--rank", type=count, metavar="R", help="bring every expert down to rank R")
    what.add_argument("--merge-to", type=count, metavar="N", help="make similar experts one, until N are left")
    parser.add_argument("--calibrate", action="append", nargs="?", const="", metavar="FILE", help=_CALIBRATE)
    parser.add_argument("--rows", type=count, default=256, metavar="N", help="calibration rows; default 256")
    parser.add_argument("--no-evaluate", dest="evaluate", action="store_false", help="score no tasks")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw; default 0")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Of `report`."""
    parser.add_argument("directory", metavar="DIR", help="folder of an adapter or a run, or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="new folder; nothing is overwritten")
    rows = "rows to look at, may be given several times; default the run's evaluation rows"
    parser.add_argument("--data", action="append", default=[], metavar="FILE", help=rows)
    parser.add_argument("--text", metavar="T", help="show its routing token by token; default a held-out row")
    parser.add_argument("--rows", type=count, metavar="N", help="rows of each task; default 16")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--no-routing", dest="routing", action="store_false", help="run no rows, load no base model")


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Of `serve`."""
    parser.usage = "molora serve DIR [DIR ...] [options] [-- VLLM ARGUMENTS]"
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="folder of an adapter, or NAME=DIR")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one the adapters name")
    parser.add_argument("--dtype", default="auto", choices=("auto", *_DTYPES), help="default auto: the checkpoint's")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="default 127.0.0.1")
    parser.add_argument("--port", type=count, default=8000, metavar="N", help="default 8000")
    parser.add_argument("--max-loras", type=count, metavar="N", help="adapters in one batch; default all")
    parser.add_argument("--max-cpu-loras", type=count, metavar="N", help="adapters kept in memory")
    parser.add_argument("--max-lora-rank", type=count, metavar="R", help="default what the adapters need")
    parser.add_argument("--hot-load", action="store_true", help="let clients load and unload adapters while it runs")
    parser.add_argument("--dry-run", action="store_true", help="print the command, and run nothing")


def add_check_serving(parser: argparse.ArgumentParser) -> None:
    """Of `check-serving`."""
    parser.add_argument("directory", metavar="DIR", help="the adapter's folder, molora's or PEFT's")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times; default six")
    parser.add_argument("--max-new-tokens", type=count, default=24, metavar="N", help="default 24")
    parser.add_argument("--base-model", metavar="X", help="name or folder; default the one it was trained on")
    parser.add_argument("--dtype", choices=_DTYPES, help="on both sides; default float32, on GPUs float16")
    parser.add_argument("--tolerance", type=positive, metavar="X", help="of a log-probability; by dtype")
    parser.add_argument("--tensor-parallel-size", type=count, default=1, metavar="N", help="default 1")
    parser.add_argument("--url", metavar="URL", help="ask a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--name", metavar="NAME", help="what that server calls the adapter")
