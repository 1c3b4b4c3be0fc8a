from dataclasses import replace

import pytest
import torch
from kernels.cases import ADAMOLE, CASES, TOP_2, Case, by_routing, differentiated, incoming, tensors_of, with_gradients
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from molora.errors import MoloraError
from molora.kernels.choices import Choices
from molora.kernels.fused import mixture

WITH_BASE = CASES["top 2 of 8, rank 8, odd sizes"]
ADAPTIVE = CASES["adaptive, minus threshold"]


def call(given, case, **changes):
    """The operation on a copy of y."""
    return mixture(**{**given, "y": given["y"] * 1}, scale=case.scale, choices=case.choices, **changes)


def trained(case, dtype=torch.float32):
    return with_gradients(tensors_of(case, dtype))


@pytest.mark.parametrize("name", CASES)
def test_the_twin_is_what_routing_and_autograd_say(name):
    case = CASES[name]
    given, grads = trained(case, torch.float64), incoming(case, torch.float64)
    wanted = differentiated(by_routing(given, case), given, grads)
    found = differentiated(call(given, case), given, grads)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize("base_weight", [False, True])
@pytest.mark.parametrize("name", ["top 2, sigmoid, balanced", "adaptive, minus threshold", "top p, softmax"])
def test_gradients_of_every_output_are_those_of_finite_differences(name, base_weight):
    case = replace(CASES[name], tokens=3, width=4, out=5, experts=4, rank=2, base_weight=base_weight)
    given = {key: value for key, value in trained(case, torch.float64).items() if value is not None}
    names = [key for key, value in given.items() if value.requires_grad]

    def function(*values):
        copies = {**given, **dict(zip(names, values, strict=True))}
        if base_weight:
            copies["y"] = (copies["x"] @ copies["base_weight"].t()).detach() + 0 * copies["y"]
        out = call(copies, case)
        # What went through the base weight is outside the graph; here finite differences see it anyway.
        return tuple(value for value in out if value.numel())

    assert torch.autograd.gradcheck(function, [given[key] for key in names])


@pytest.mark.parametrize("case", [WITH_BASE, replace(ADAPTIVE, base_weight=False), CASES["two shared experts"]])
def test_torch_finds_no_fault_with_the_operations(case):
    given = trained(case)
    base = given.pop("base_weight")
    choices = tuple(vars(case.choices).values())
    arguments = (*given.values(), base, case.scale, *choices, "torch")
    torch.library.opcheck(torch.ops.molora.mixture.default, arguments)
    with torch.no_grad():
        y, logits, threshold_logit, weights, h = torch.ops.molora.mixture(*arguments)
        saved = [given[name] for name in ("x", "a", "router", "b", "threshold_row")]
        saved = [*saved, base, h, logits, threshold_logit, weights]
        saved = [None if value is None else value.detach() for value in saved]
        for needs in ([True] * 4, [True, False, True, False], [False, True, False, True]):
            torch.library.opcheck(
                torch.ops.molora.mixture_backward.default,
                (y, logits, None, None, *saved, needs, case.scale, *choices, "torch"),
                test_utils=("test_schema", "test_faketensor"),
            )


@pytest.mark.parametrize("case", [WITH_BASE, ADAPTIVE])
def test_a_compiled_graph_is_whole_and_gives_the_same(case):
    given, grads = trained(case), incoming(case, torch.float32)
    compiled = torch.compile(lambda given: call(given, case), fullgraph=True, backend="aot_eager")
    wanted = differentiated(call(given, case), given, grads)
    found = differentiated(compiled(given), given, grads)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], msg=key)


def test_y_is_written_in_place_and_gets_the_gradient_unless_there_is_a_base_weight():
    given = trained(replace(WITH_BASE, base_weight=False))
    y = given["y"] * 1
    out = mixture(**{**given, "y": y}, scale=1.0, choices=TOP_2)
    assert out.y is y
    out.y.sum().backward()
    assert torch.equal(given["y"].grad, torch.ones_like(y))
    given = trained(WITH_BASE)
    given["y"].requires_grad_()
    call(given, WITH_BASE).y.sum().backward()
    assert given["y"].grad is None
    assert given["base_weight"].grad is None


@pytest.mark.parametrize("graph", [True, False])
def test_rows_flattened_into_tokens_are_written_in_place_too(graph):
    given = trained(replace(WITH_BASE, base_weight=False, tokens=6))
    x, weight = given["x"], torch.randn(WITH_BASE.out, WITH_BASE.width)
    wanted = call({**given, "y": x @ weight.t()}, WITH_BASE)
    gradients = torch.autograd.grad(wanted.y.square().sum() + wanted.weights[:, 0].sum(), [x, given["a"]])
    with torch.set_grad_enabled(graph):
        rows = torch.nn.functional.linear(x.view(2, 3, -1), weight)
        y = rows.flatten(0, 1)
    out = mixture(**{**given, "y": y, "base_weight": None if graph else weight}, scale=WITH_BASE.scale, choices=TOP_2)
    assert out.y.data_ptr() == rows.data_ptr()
    torch.testing.assert_close(out.y, wanted.y)
    found = torch.autograd.grad(out.y.square().sum() + out.weights[:, 0].sum(), [x, given["a"]])
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("view", [False, True])
def test_who_saved_y_for_a_backward_pass_is_told(view):
    given = trained(replace(WITH_BASE, base_weight=False, tokens=6))
    saved = (given["y"] * 1).view(2, 3, -1)
    before = saved.square()
    mixture(**{**given, "y": saved.flatten(0, 1) if view else saved._base}, scale=1.0, choices=TOP_2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()


@pytest.mark.parametrize("frozen", [("x",), ("a",), ("b",), ("router", "router_bias"), ("x", "a", "b")])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen, backend):
    pytest.importorskip("triton")
    case = replace(WITH_BASE, tokens=5, width=16, out=16, experts=4)
    given = trained(case)
    every = [value for value in given.values() if value is not None and value.requires_grad]
    call(given, case, backend=backend).y.square().sum().backward()
    wanted = {name: value.grad for name, value in given.items() if value is not None}
    for value in every:
        value.grad = None
    for name in frozen:
        given[name].requires_grad_(False)
    call(given, case, backend=backend).y.square().sum().backward()
    for name, value in given.items():
        if value is not None and value.requires_grad:
            torch.testing.assert_close(value.grad, wanted[name])
        elif value is not None:
            assert value.grad is None


def test_auxiliary_losses_alone_reach_router_and_input():
    given = trained(ADAPTIVE)
    out = call(given, ADAPTIVE)
    (out.logits.square().sum() + out.weights[:, 0].sum()).backward()
    wanted = trained(ADAPTIVE)
    _, logits, _, weights = by_routing(wanted, ADAPTIVE)
    (logits.square().sum() + weights[:, 0].sum()).backward()
    for name in ("x", "router", "threshold_row", "router_bias", "threshold_bias"):
        torch.testing.assert_close(given[name].grad, wanted[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not given["a"].grad.any()


@pytest.mark.parametrize("case", [WITH_BASE, ADAPTIVE])
def test_nothing_wide_is_saved_but_x(case):
    given, seen = trained(case, torch.bfloat16), {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    y = given["y"] * 1
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        mixture(**{**given, "y": y}, scale=case.scale, choices=case.choices)
    for value in given.values():
        if value is not None:
            seen.pop(value.untyped_storage().data_ptr(), None)
    hidden = case.tokens * case.experts * case.rank * 2
    routed = case.tokens * case.experts * 4 * 2 + case.tokens * 4 * case.choices.adaptive
    assert sum(seen.values()) == hidden + routed


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant):
    given, grads = trained(ADAPTIVE), incoming(ADAPTIVE, torch.float32)

    def run(x):
        out = call({**given, "x": x}, ADAPTIVE)
        return out.y, out.logits, out.threshold_logit, out.weights

    wanted, found = [], []
    for results, outputs in (
        (wanted, run(given["x"])),
        (found, checkpoint(run, given["x"], use_reentrant=use_reentrant)),
    ):
        torch.autograd.backward(outputs, grads)
        for value in given.values():
            if value is not None and value.grad is not None:
                results.append(value.grad)
                value.grad = None
    assert len(wanted) == 7
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_rounds_nothing_inside():
    given = trained(ADAPTIVE)
    wanted = call(given, ADAPTIVE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixture(**{**given, "y": given["y"] * 1.0}, scale=ADAPTIVE.scale, choices=ADAPTIVE.choices)
        grads = torch.autograd.grad(found.y.square().sum(), [given["a"], given["router"]])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(
        grads, torch.autograd.grad(wanted.y.square().sum(), [given["a"], given["router"]]), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens_are_no_error(backend):
    pytest.importorskip("triton")
    given = trained(replace(ADAPTIVE, tokens=0))
    out = call(given, ADAPTIVE, backend=backend)
    out.y.sum().backward()
    assert out.y.shape == (0, ADAPTIVE.out)
    assert not given["router"].grad.any()


WRONG = {
    "b of other ranks": ({"b": torch.zeros(37, 17)}, {}, r"b of the fused operation has shape \[37, 17\].*\[37, 18\]"),
    "unequal ranks": (
        {"a": torch.zeros(17, 34), "b": torch.zeros(37, 17)}, {}, "17 rows for 6 experts.*unfused layer"
    ),
    "y of other dtype": ({"y": torch.zeros(19, 37).bfloat16()}, {}, "y is torch.bfloat16 and x torch.float32"),
    "router of other dtype": ({"router": torch.zeros(6, 34).bfloat16()}, {}, "router is torch.bfloat16; allowed are"),
    "no threshold row": ({}, {"choices": ADAMOLE}, "needs threshold_row"),
    "threshold row unasked": ({"threshold_row": torch.zeros(1, 34)}, {}, "has no threshold_row"),
    "more than there are": ({}, {"choices": replace(TOP_2, top_k=7)}, "top_k is 7, but there are 6 experts"),
    "unknown backend": ({}, {"backend": "tritn"}, "did you mean|Did you mean 'triton'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_with_what_would(name):
    tensors, options, message = WRONG[name]
    given = {**tensors_of(Case(TOP_2), torch.float32), **tensors}
    with pytest.raises(MoloraError, match=message):
        mixture(**given, **{"scale": 1.0, "choices": TOP_2, **options})


def test_fp64_is_refused_by_the_kernels():
    given = tensors_of(Case(TOP_2), torch.float64)
    with pytest.raises(MoloraError, match="the kernels take fp32, bf16 and fp16"):
        mixture(**given, scale=1.0, choices=TOP_2, backend="triton")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": "softmx"}, "Did you mean 'softmax'"),
        ({"selection": "top-k"}, "Did you mean 'top_k'"),
        ({"top_k": 0}, "top_k of the fused operation: got 0"),
        ({"temperature": 0.0}, "give a positive number"),
    ],
)
def test_choices_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(MoloraError, match=message):
        Choices(**{"gate": "softmax", "selection": "top_k", **fields})
