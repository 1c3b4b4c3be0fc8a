"""Time the Triton kernels of a mixture on a GPU, against plain LoRA and against the same mixture in plain torch.

    python benchmarks/gpu_kernels.py --json results.json

One linear, with its frozen weight, forward and forward plus backward. Every candidate runs once in each round, in an
order that rotates, after the L2 cache was overwritten; CUDA events time it. A table gives the median and the quartiles
of its time, the median of its time over that of LoRA of equal active rank in the same round, and what the host took to
issue it, which is what counts at few tokens without CUDA graphs. The second LoRA row is the first one again: what lies
within its quartiles is no difference, and says so. Before a time is printed, outputs and gradients are compared with
fp64; a kernel may be off by at most twice what plain torch is off by in the same dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.kernels.adapter_parts import AdapterParts
from molora.kernels.choices import Choices
from molora.kernels.fused import mixture
from molora.kernels.multi_adapter import mixed_rows
from molora.routing.route import RoutingSpec, route

SCALE = 0.5
REFERENCE, AGAIN, WHOLE = "LoRA, active rank", "LoRA, active rank again", "LoRA, total rank"
Step = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One shape: E experts of rank r, of which k are used, for T tokens, and shared ones that are always used."""

    experts: int
    rank: int
    top_k: int
    tokens: int
    shared: int = 0

    @property
    def name(self) -> str:
        shared = f"+{self.shared}" if self.shared else ""
        return f"E{self.experts}{shared} r{self.rank} k{self.top_k} T{self.tokens}"

    @property
    def active_rank(self) -> int:
        """Rank that one token uses."""
        return (self.top_k + self.shared) * self.rank

    @property
    def total_rank(self) -> int:
        """Rank of all experts."""
        return (self.experts + self.shared) * self.rank

    @property
    def choices(self) -> Choices:
        return Choices("softmax", "top_k", renormalize=True, top_k=self.top_k, shared_experts=self.shared)


@dataclass
class Layer:
    """Tensors of one case: frozen weight `[out, in]`, input `[T, in]`, adapters, and a gradient `[T, out]`."""

    case: Case
    weight: Tensor
    x: Tensor
    gradient: Tensor
    a: Tensor
    router: Tensor
    b: Tensor

    @classmethod
    def random(cls, case: Case, width: int, dtype: torch.dtype, device: str) -> Layer:
        """Every matrix keeps the size of what it multiplies; no token is near a tie of its k-th expert."""

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

        ranks = case.total_rank
        x = torch.randn(case.tokens, width, device=device).to(dtype)
        router = normal(case.experts, width, dtype=torch.float32)
        if case.top_k < case.experts:
            # A tie that falls differently in fp64 is no error of a kernel.
            best = (x.double() @ router.double().T).topk(case.top_k + 1).values
            clear = (best[:, -2] - best[:, -1]).sort(descending=True).indices[: (case.tokens + 1) // 2]
            x = x[clear].repeat(2, 1)[: case.tokens]
        leaves = [x, normal(ranks, width), router, normal(width, ranks)]
        x, a, router, b = (leaf.contiguous().requires_grad_() for leaf in leaves)
        return cls(case, normal(width, width), x, normal(case.tokens, width), a, router, b)

    def lora(self, rank: int) -> Step:
        """Plain LoRA as lean as autograd makes it: two small products, added into the output of the frozen weight."""
        ranks = torch.arange(rank, device=self.a.device) % self.a.shape[0]
        a, b = (m.detach().contiguous().requires_grad_() for m in (self.a[ranks], self.b[:, ranks]))
        return self._step(lambda: torch.addmm(self._base(), self.x @ a.T, b.T, alpha=SCALE), (self.x, a, b))

    def mixture(self, backend: str) -> Step:
        """The operation of `molora.kernels.fused`."""

        def forward() -> Tensor:
            with torch.no_grad():
                y = self._base()
            parts = (self.x, y, self.a, self.router, self.b)
            return mixture(*parts, scale=SCALE, choices=self.case.choices, base_weight=self.weight, backend=backend)[0]

        return self._step(forward, (self.x, self.a, self.router, self.b))

    def autograd(self, dtype: torch.dtype) -> list[Tensor]:
        """Output and gradients by plain torch in a dtype, routing in at least fp32."""
        exact = torch.promote_types(dtype, torch.float32)
        kinds = {self.router: exact}
        leaves = (self.x, self.a, self.router, self.b)
        x, a, router, b = (leaf.detach().to(kinds.get(leaf, dtype)).requires_grad_() for leaf in leaves)
        spec = RoutingSpec("softmax", "top_k", "probability", True, 1.0, self.case.top_k, 0.0, 0.0, 0.0)
        weights = F.pad(route(x.to(exact) @ router.T, spec).weights, (0, self.case.shared), value=1.0)
        gates = SCALE * weights.repeat_interleave(self.case.rank, 1)
        y = x @ self.weight.to(dtype).T + ((x @ a.T) * gates.to(dtype)) @ b.T
        return [y, *torch.autograd.grad(y, (x, a, router, b), self.gradient.to(dtype))]

    def base(self) -> Step:
        """The frozen weight alone."""
        return self._step(self._base, (self.x,))

    def _base(self) -> Tensor:
        return F.linear(self.x, self.weight)

    def _step(self, forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Step:
        def step(backward: bool = True) -> list[Tensor]:
            with torch.set_grad_enabled(backward):
                y = forward()
            return [y, *torch.autograd.grad(y, leaves, self.gradient)] if backward else [y]

        return step


@dataclass
class Timing:
    """Seconds of every round, on the device and of the host that issued it."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)


class Clock:
    """Times one call at a time: by events on a GPU, by the clock of the process on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.cache = torch.empty(2**28 if self.cuda else 0, dtype=torch.int8, device=device)

    def time(self, step: Step) -> tuple[float, float]:
        """Seconds of the device and of the host."""
        if not self.cuda:
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
            return seconds, seconds
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.cache.zero_()  # takes as long as the host needs to issue most steps, which so does not count
        before.record()
        started = time.perf_counter()
        step()
        host = time.perf_counter() - started
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after) / 1000, host


def interleaved(steps: dict[str, Step], rounds: int, clock: Clock) -> dict[str, Timing]:
    """Run every step once a round, each round beginning with another one."""
    names = list(steps)
    for name in names:
        for _ in range(3):
            steps[name]()
    timings = {name: Timing() for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            device, host = clock.time(steps[name])
            timings[name].device.append(device)
            timings[name].host.append(host)
    return timings


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rows_of(timings: dict[str, Timing], reference: str, again: str) -> list[dict[str, Any]]:
    """One row per candidate; `differs` is false where the A/A row could have given its ratio too.

    Args:
        timings: Of all candidates of one table.
        reference: The candidate that the others are divided by.
        again: The same code as `reference`, built a second time.
    """
    ratios = {
        name: quartiles([mine / theirs for mine, theirs in zip(t.device, timings[reference].device, strict=True)])
        for name, t in timings.items()
    }
    noise = max(abs(value - 1) for value in ratios[again])
    return [
        {
            "name": name,
            "microseconds": [1e6 * value for value in quartiles(timing.device)],
            "host_microseconds": 1e6 * statistics.median(timing.host),
            "ratio": list(ratios[name]),
            "differs": name not in (reference, again) and abs(ratios[name][1] - 1) > noise,
            "raw_seconds": timing.device,
        }
        for name, timing in timings.items()
    ]


def disagreements(layer: Layer, step: Step) -> list[str]:
    """What a step computes worse than twice as far from fp64 as plain torch in the same dtype.

    The router's gradient may be off by one rounding more: with one token and two experts it is one number times x, in
    which torch may be right by luck.
    """
    rounding = {"drouter": max(1e-5, torch.finfo(layer.x.dtype).eps)}
    exact, plain, ours = layer.autograd(torch.float64), layer.autograd(layer.x.dtype), step()
    found = []
    for name, want, eager, got in zip(("y", "dx", "dA", "drouter", "dB"), exact, plain, ours, strict=True):
        allowed = 2 * (eager - want).abs().max().item() + rounding.get(name, 1e-5) * want.abs().max().item()
        error = (got - want).abs().max().item()
        if not error <= allowed:  # so that NaN is found too
            found.append(f"{name} is off by {error:.2e}, allowed are {allowed:.2e}")
    return found


def one_mixture(case: Case, arguments: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Tables of one case: forward, forward and backward."""
    layer = Layer.random(case, arguments.width, getattr(torch, arguments.dtype), arguments.device)
    equal, total = case.active_rank, case.total_rank
    mixtures = {f"mixture, {name}": layer.mixture(name) for name in arguments.backends}
    for name, step in mixtures.items():
        wrong = disagreements(layer, step)
        if wrong:
            sys.exit(f"{case.name}, {name}: {'; '.join(wrong)}. Nothing was timed.")
    steps = {
        "frozen weight": layer.base(),
        REFERENCE: layer.lora(equal),
        AGAIN: layer.lora(equal),
        WHOLE: layer.lora(total),
        **mixtures,
    }
    tables = []
    for title, backward in (("forward", False), ("forward and backward", True)):
        bound = {name: partial(step, backward) for name, step in steps.items()}
        timings = interleaved(bound, arguments.rounds, clock)
        tables.append({"title": f"{case.name}, {title}", "rows": rows_of(timings, REFERENCE, AGAIN)})
    return tables


def many_adapters(case: Case, arguments: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Table of a batch of eight rows, each with its own adapter, against all with the same one."""
    dtype, device, count = getattr(torch, arguments.dtype), arguments.device, 8
    layers = [Layer.random(case, arguments.width, dtype, device) for _ in range(count)]
    parts = [AdapterParts(one.a.detach(), one.router.detach(), one.b.detach(), SCALE) for one in layers]
    x, base = (torch.stack(rows).detach() for rows in zip(*((one.x, one._base()) for one in layers), strict=True))
    own, same = list(range(count)), [0] * count
    exact, plain = (torch.stack([one.autograd(kind)[0] for one in layers]) for kind in (torch.float64, dtype))
    allowed = 2 * (plain - exact).abs().max().item() + 1e-5 * exact.abs().max().item()
    scratch = base.clone()
    steps: dict[str, Step] = {}
    for backend in arguments.backends:

        def step(index: list[int], y: Tensor = scratch, backend: str = backend) -> Tensor:
            return mixed_rows(x, y, index, parts, case.choices, backend)

        error = (step(own, base.clone()) - exact).abs().max().item()
        if not error <= allowed:
            sys.exit(f"{case.name}, 8 adapters, {backend}: off by {error:.2e}, allowed are {allowed:.2e}.")
        for name, index in (("1 adapter", same), ("1 adapter again", same), ("8 adapters", own)):
            steps[f"{name}, {backend}"] = partial(step, index)
    timings = interleaved(steps, arguments.rounds, clock)
    first = arguments.backends[0]
    rows = rows_of(timings, f"1 adapter, {first}", f"1 adapter again, {first}")
    return [{"title": f"{case.name} in each of 8 rows, inference, without the frozen weight", "rows": rows}]


def show(table: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{table['title']}")
    print(f"  {'':24} {'median us':>10} {'quartiles':>19} {'ratio':>6} {'quartiles':>13} {'host us':>8}")
    for row in table["rows"]:
        low, middle, high = row["microseconds"]
        ratio_low, ratio, ratio_high = row["ratio"]
        is_reference = row["ratio"] == [1, 1, 1]
        remark = "  the reference" if is_reference else "" if row["differs"] else "  not distinguishable"
        print(
            f"  {row['name']:24} {middle:10.1f} {f'{low:.1f}-{high:.1f}':>19} {ratio:6.2f} "
            f"{f'{ratio_low:.2f}-{ratio_high:.2f}':>13} {row['host_microseconds']:8.1f}{remark}"
        )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 8192])
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["8,8,2", "8,16,2", "16,16,2", "64,1,4", "6,8,2,2"],
        help="E,r,k or E,r,k,shared",
    )
    parser.add_argument("--row-tokens", type=int, nargs="+", default=[1, 512], help="of a batch of many adapters")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    # For the tests of this file: its arithmetic and its tables, with the plain-torch form alone.
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.backends = ["triton", "torch"] if arguments.device == "cuda" else ["torch"]
    return arguments


def main() -> int:
    """Check, time and print every case."""
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device: this times GPU kernels. Run it where `torch.cuda.is_available()`.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    clock = Clock(arguments.device)
    device = torch.cuda.get_device_name() if clock.cuda else "CPU"
    print(f"{device}, torch {torch.__version__}, {arguments.dtype}, width {arguments.width}")
    shapes = [tuple(map(int, shape.split(","))) for shape in arguments.shapes]
    tables = []
    for run, counts in ((one_mixture, arguments.tokens), (many_adapters, arguments.row_tokens)):
        for experts, rank, top_k, *shared in shapes:
            for tokens in counts:
                for table in run(Case(experts, rank, top_k, tokens, *shared), arguments, clock):
                    show(table)
                    tables.append(table)
    if arguments.json:
        options = {name: value for name, value in vars(arguments).items() if name != "json"}
        result = {"device": device, "torch": torch.__version__, "options": options, "tables": tables}
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
