"""Count the memory of a training step, for one linear and for the whole model. Nothing here is timed.

    python -m benchmarks.memory
    python -m benchmarks.memory --dtype bfloat16 --only molora PEFT

Two numbers for each: the most bytes of tensors at once during forward and backward pass, over those that were there
before (weights, input, the gradient of a single layer's output), and the bytes saved for the backward pass beside
parameters and input. Gradients of the adapter are in the first; the optimizer's state, twice the adapter's size in
all methods, is in neither.

The unit is one tensor [T, d]: of the linear's input for one linear, of the hidden states for the model.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import checks, report
from benchmarks.allocations import Saved, peak_bytes
from benchmarks.command import methods_of, parser, sizes_of
from benchmarks.methods import Built, Method, OneLinear, Sizes, build
from molora.kernels import dispatch


def of_layer(method: Method, sizes: Sizes, width: int, tokens: int) -> dict[str, float]:
    """Memory of one linear `[width, width]` for `[1, tokens, width]`, in units of its input."""
    torch.manual_seed(0)
    built = build(method, sizes, OneLinear(width, sizes.dtype))
    x = torch.randn(1, tokens, width, dtype=sizes.dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def step() -> None:
        built.model(x, **built.keywords).backward(gradient)

    with Saved([x, *_weights(built)]) as saved:
        step()
    return _counted(built, step, saved, x, x.nbytes)


def of_model(method: Method, sizes: Sizes, ids: Tensor) -> dict[str, float]:
    """Memory of the whole model, in units of its hidden states `[B, S, hidden]`."""
    built = build(method, sizes)

    def step() -> None:
        logits = built(input_ids=ids, use_cache=False).logits
        functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()

    with Saved(_weights(built)) as saved:
        step()
    unit = ids.numel() * sizes.hidden * torch.empty(0, dtype=sizes.dtype).element_size()
    return _counted(built, step, saved, None, unit)


def _weights(built: Built) -> list[Tensor]:
    return [*built.model.parameters(), *built.model.buffers(), *built.trained]


def _counted(built: Built, step: Any, saved: Saved, x: Tensor | None, unit: int) -> dict[str, float]:
    """The first step warmed up what is allocated once; its gradients go before the second is counted."""
    for tensor in [*built.trained, *([] if x is None else [x])]:
        tensor.grad = None
    return {"peak": peak_bytes(step) / unit, "saved": saved.bytes / unit}


def main(given: Sequence[str] | None = None) -> int:
    """Count and print; the exit status."""
    made = parser(str(__doc__), batch=1, length=512)
    made.add_argument("--width", type=int, default=2048, help="inputs and outputs of the single linear")
    made.add_argument("--tokens", type=int, default=1024, help="tokens of the single linear")
    made.add_argument("--part", choices=["both", "layer", "model"], default="both")
    arguments = made.parse_args(given)
    torch.set_num_threads(arguments.threads)
    sizes = sizes_of(arguments)
    methods, missing = methods_of(arguments, sizes)
    shape = (arguments.batch, arguments.length)
    ids = torch.randint(1, arguments.vocab, shape, generator=torch.manual_seed(0))
    try:
        errors = checks.check_methods(methods, sizes, ids, backward=True, training=True)
    except checks.WrongResultError as error:
        print(f"memory: {error}", file=sys.stderr)
        return 1
    parts = {"layer": "one linear", "model": "whole model"}
    counted: dict[str, list[dict[str, Any]]] = {}
    for part, title in parts.items():
        if arguments.part in ("both", part):
            counted[title] = _rows(part, methods, sizes, arguments.width, arguments.tokens, ids)
    shapes = dataclasses.asdict(sizes) | {"batch": arguments.batch, "length": arguments.length}
    shapes |= {"dtype": arguments.dtype, "width": arguments.width, "tokens": arguments.tokens}
    print(report.heading("memory", arguments.threads, "bytes counted, not timed", shapes))
    for title, rows in counted.items():
        print(f"\n{title}, units of one [T, d] tensor")
        print(report.table([name for name in rows[0] if name != "kind"], rows))
    for name, why in missing.items():
        print(f"left out: {name}: {' '.join(why.split())}")
    content = {
        "shapes": shapes,
        "kernels": dispatch.backend(),
        "reference": methods[0].name,
        "checked": errors,
        "rows": [{"part": title} | row for title, rows in counted.items() for row in rows],
        "missing": missing,
    }
    report.write_json(arguments.json, "memory", arguments.threads, content)
    return 0


def _rows(
    part: str, methods: Sequence[Method], sizes: Sizes, width: int, tokens: int, ids: Tensor
) -> list[dict[str, Any]]:
    """The reference is counted again at the end: exact numbers must come out the same."""
    again = dataclasses.replace(methods[0], name=f"A/A {methods[0].name}")
    rows: list[dict[str, Any]] = []
    for method in [*methods, again]:
        if part == "layer" and not method.one_layer:
            continue
        with checks.kernels(method.kernels):
            found = of_layer(method, sizes, width, tokens) if part == "layer" else of_model(method, sizes, ids)
        reference = rows[0]["peak"] if rows else found["peak"]
        row = {"method": method.name, "kind": method.kind, "peak": found["peak"], "saved": found["saved"]}
        rows.append(row | {f"peak x {methods[0].name}": found["peak"] / reference})
    return rows


if __name__ == "__main__":
    sys.exit(main())
