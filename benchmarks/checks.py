"""Is what will be timed right? Asked before any number is printed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.methods import Built, Method, Sizes, build
from molora.kernels import dispatch

TOLERANCES = {torch.float32: 3e-2, torch.bfloat16: 5e-2}
"""Largest relative error in the norm of a whole tensor. Rounding is far below, but where two experts of a token are so
close that rounding swaps them, that token's gradient is another: one of 512 tokens makes about 1e-2. The tests compare
in fp64, where nothing swaps, to 1e-9."""


class WrongResultError(Exception):
    """What was to be timed does not compute what it should."""


def kernels(backend: str | None) -> AbstractContextManager[None]:
    """Use an implementation inside the block; `None` leaves the choice as it is."""
    return nullcontext() if backend is None else dispatch.using(backend)


def outcome(built: Built, ids: Tensor, backward: bool) -> dict[str, Tensor]:
    """Logits `[B, S, vocab]`, and the gradient of each trained parameter, under its name if it has one."""
    with torch.set_grad_enabled(backward):
        logits = built(input_ids=ids, use_cache=False).logits
    found = {"the logits": logits.detach()}
    if not backward:
        return found
    # Every logit counts, with a weight of its own: a mistake anywhere reaches some gradient.
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype)
    (logits * weights).sum().backward()
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    for position, parameter in enumerate(built.trained):
        if parameter.grad is not None:
            name = names.get(id(parameter), f"trained parameter {position}")
            found[f"the gradient of {name}"], parameter.grad = parameter.grad, None
    return found


def largest_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a tensor, `‖got − wanted‖ / ‖wanted‖`, and which one it is.

    A tensor that is much smaller than others of its kind is measured against those: what remains of sums that cancel
    is rounding.
    """
    if got.keys() != wanted.keys():
        lost = sorted(got.keys() ^ wanted.keys())
        return float("inf"), f"{lost[0]}, which only one of the two has"
    norms = {name: value.double().norm().item() for name, value in wanted.items()}
    largest: dict[str, float] = {}
    for name, norm in norms.items():
        largest[_kind(name)] = max(norm, largest.get(_kind(name), 0.0))
    worst = (0.0, "the logits")
    for name, value in wanted.items():
        distance = (got[name].double() - value.double()).norm().item()
        scale = max(norms[name], 1e-2 * largest[_kind(name)], torch.finfo(torch.float32).tiny)
        error = distance / scale if distance == distance else float("inf")
        worst = max(worst, (error, name))
    return worst


def _kind(name: str) -> str:
    """The same parameter of the same linear, in any layer: `q_proj.molora_A.default.weight`."""
    return ".".join(name.split(".")[-4:])


def check_methods(
    methods: Sequence[Method], sizes: Sizes, ids: Tensor, backward: bool, training: bool
) -> dict[str, Any]:
    """Check every method on the model it is timed on.

    molora under the kernels that will be timed must compute what its plain-torch form computes; loops, which hold the
    same weights, must compute what molora does; peers must change the base model's output and train all they have.

    Args:
        methods: What is to be timed.
        sizes: Of the models.
        ids: `[B, S]`.
        backward: Compare gradients too.
        training: Whether it is timed in training mode.

    Returns:
        The largest error of each method, for the record.

    Raises:
        WrongResultError: Naming the method, the tensor and the error.
    """
    tolerance, errors = TOLERANCES[sizes.dtype], {}
    plain: Tensor | None = None
    for method in methods:
        if method.kind in ("base", "peft"):
            continue
        built = build(method, sizes, training=training)
        if method.kind == "peer":
            if plain is None:
                plain = outcome(build(_BASE, sizes, training=training), ids, False)["the logits"]
            _check_peer(method, built, ids, plain, backward)
            continue
        got = outcome(built, ids, backward)
        if method.kind == "molora":
            with kernels("reference"):
                wanted = outcome(built, ids, backward)
            what = "its plain-torch form (MOLORA_KERNELS=reference)"
        else:
            got = {"the logits": got["the logits"]}
            assert method.twin is not None
            twin = build(method.twin, sizes, training=training)
            with kernels("reference"):
                wanted = outcome(twin, ids, False)
            what = f"{method.twin.name!r} with the same weights"
        error, name = largest_error(got, wanted)
        if not error <= tolerance:
            raise WrongResultError(
                f"{method.name!r} differs from {what} in {name}: relative error {error:.1e}, allowed for "
                f"{str(sizes.dtype).removeprefix('torch.')} is {tolerance:.0e}. Nothing was timed."
            )
        errors[method.name] = {"error": error, "where": name, "tolerance": tolerance}
    return errors


def _check_peer(method: Method, built: Built, ids: Tensor, plain: Tensor, backward: bool) -> None:
    found = outcome(built, ids, backward)
    logits = found["the logits"]
    if not torch.isfinite(logits).all():
        raise WrongResultError(f"{method.name!r} gives logits that are not finite. Nothing was timed.")
    if torch.equal(logits, plain):
        raise WrongResultError(f"{method.name!r} does not change the base model's output. Nothing was timed.")
    if backward and len(found) - 1 < len(built.trained):
        raise WrongResultError(
            f"{method.name!r} gives gradients to {len(found) - 1} of {len(built.trained)} trained parameters. "
            "Nothing was timed."
        )


_BASE = Method("base", "base", lambda base, _sizes: Built(base, []))
