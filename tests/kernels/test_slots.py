"""A server's slots, and the operation that routes by them: what fits, what is refused, and graphs."""

import pytest
import torch
from kernels.cases import DEVICES, HAS_GPU
from kernels.gates import (
    GATES,
    LEARNED,
    MIXED_SLOTS,
    RANKS,
    WIDTH,
    close,
    gate,
    mixed_products,
    mixed_tables,
    tokens_of,
)

from molora.errors import MoloraError
from molora.serving import op
from molora.serving.op import reference, route_ranks
from molora.serving.tables import SlotTables, why_not

pytest.importorskip("triton")

from molora.kernels.triton import common


@pytest.mark.parametrize("after", [GATES["one expert"], None, "off"], ids=["small", "plain", "off"])
def test_a_slot_written_anew_keeps_nothing_of_what_it_held(after):
    big = gate((2,) * 8, balanced=True, offset=True, null_experts=4, top_k=5, parts=2, threshold_offset=3.0, **LEARNED)
    tables, fresh = SlotTables(2, 2, RANKS, 16), SlotTables(2, 2, RANKS, 16)
    addresses = tables.ints.data_ptr(), tables.numbers.data_ptr()
    tables.write(1, 1, big)
    assert not torch.equal(tables.ints, fresh.ints)
    tables.write(1, 1, after)
    fresh.write(1, 1, after)
    assert torch.equal(tables.ints, fresh.ints)
    assert torch.equal(tables.numbers, fresh.numbers)
    assert (tables.ints.data_ptr(), tables.numbers.data_ptr()) == addresses
    assert tables.gates == [["off", "off"], ["off", after]]


WRONG_GATES = {
    "too many logits": (gate((1,) * 9), r"routes among 9 experts, and the kernel's tables have room for 8"),
    "blend": (gate(weights="blend"), "does not know weights='blend'; it knows 'probability'"),
    "scores": (gate(score_weight=1.0), "outside scores"),
    "unknown gate": (gate(gate="softmx"), "does not know gate='softmx'"),
    "unknown selection": (gate(selection="best"), "does not know selection='best'"),
    "unknown shared weight": (gate(shared_weight="two"), "does not know shared_weight='two'"),
    "logits of no expert": (gate(logits=7), "7 logits, 0 of them for null experts, and 6 experts"),
    "activation of wide experts": (gate((2, 2), source="activation"), "got 4 ranks and 2 logits"),
    "norm with offset": (gate(source="activation_norm", offset=True), "has no offset"),
    "activation of a scaled input": (gate((1, 1), source="activation", input_scale="normalize"), "no input_scale"),
}


@pytest.mark.parametrize("name", WRONG_GATES)
def test_what_the_kernel_cannot_express_is_refused_and_the_slot_stays_as_it_was(name):
    one, message = WRONG_GATES[name]
    tables = SlotTables(1, 1, RANKS, 8)
    tables.write(0, 0, GATES["top 2"])
    before = tables.ints.clone()
    with pytest.raises(MoloraError, match=message):
        tables.write(0, 0, one)
    assert torch.equal(tables.ints, before)
    assert tables.gates == [[GATES["top 2"]]]


def test_every_gate_of_the_cases_can_be_expressed():
    assert {name: why_not(one, 64) for name, one in GATES.items()} == dict.fromkeys(GATES)


def test_places_that_are_not_there_are_refused():
    tables = SlotTables(2, 3, 24)
    assert tables.experts == 32
    for slot, index, message in ((3, 0, "slot .* got 3; allowed are 0 to 2"), (0, -1, "slice .* got -1")):
        with pytest.raises(MoloraError, match=message):
            tables.write(slot, index, None)
    with pytest.raises(MoloraError, match=r"packs 40 rows \(30 of experts\), and a slot has room for 24"):
        tables.write(0, 0, gate((3,) * 10))
    with pytest.raises(MoloraError, match="got 'of'; allowed are"):
        tables.write(0, 0, "of")
    for experts in (0, 24, 256):
        with pytest.raises(MoloraError, match=f"got {experts}; allowed are powers of two from 1 to 128"):
            SlotTables(1, 1, 24, experts)


WRONG_CALLS = {
    "other ranks": ({"buffer": torch.zeros(1, 4, 9), "products": torch.zeros(1, 4, 9)}, "wants buffer and products"),
    "other slices": ({"buffer": torch.zeros(2, 4, 8), "products": torch.zeros(2, 4, 8)}, "for 1 slices"),
    "other products": ({"products": torch.zeros(1, 5, 8)}, r"\[1, 4, 8\], \[1, 5, 8\]"),
    "other tokens": ({"x": torch.zeros(3, 6)}, r"\[3, 6\]"),
    "too few slots": ({"slots": torch.zeros(3, dtype=torch.int64)}, "wants buffer and products"),
    "16 bits": ({"products": torch.zeros(1, 4, 8).bfloat16()}, "in fp32; got torch.float32 and torch.bfloat16"),
    "strided": ({"products": torch.zeros(1, 4, 16)[..., ::2]}, "contiguous"),
    "strided x": ({"x": torch.zeros(6, 4).t()}, "contiguous rows of x"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.skipif(HAS_GPU, reason="kernels are compiled for the GPU")
def test_tensors_that_do_not_fit_are_refused(name):
    changed, message = WRONG_CALLS[name]
    given = {
        "buffer": torch.zeros(1, 4, 8),
        "products": torch.zeros(1, 4, 8),
        "x": torch.zeros(4, 6),
        "slots": torch.zeros(4, dtype=torch.int64),
        **changed,
    }
    with pytest.raises(MoloraError, match=message):
        route_ranks(**given, tables=SlotTables(1, 1, 8))


def test_tensors_on_the_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(common, "INTERPRETED", False)
    buffer = torch.zeros(1, 2, 8)
    with pytest.raises(MoloraError, match=r"tensors on the CPU; call `molora\.serving\.op\.reference`"):
        route_ranks(buffer, buffer, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), SlotTables(1, 1, 8))


def arguments(separate, device):
    tables = SlotTables(1, 2, 32, 8, device=device)
    tables.write(0, 0, GATES["top 2"])
    tables.write(1, 0, None)
    buffer = torch.randn(1, 4, 32, device=device)
    products = torch.randn(1, 4, 32, device=device) if separate else None
    return buffer, products, tokens_of(tokens=4).to(device), torch.tensor([0, -1, 1, 0], device=device), tables


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("separate", [False, True])
def test_torch_finds_no_fault_with_the_operation(separate, device):
    *tensors, tables = arguments(separate, device)
    torch.library.opcheck(
        torch.ops.molora.route_ranks.default, (*tensors, tables.ints, tables.numbers, tables.experts)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("separate", [False, True])
def test_a_compiled_graph_is_whole_and_sees_what_a_slot_holds_now(separate, device):
    buffer, products, x, slots, tables = arguments(separate, device)

    def layer(buffer, products):
        hidden = buffer * 1.0
        route_ranks(hidden, hidden if products is None else products, x, slots, tables)
        return hidden * 2.0

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one in (GATES["top 2"], GATES["dense relu"]):
        tables.write(0, 0, one)
        wanted = buffer.clone()
        reference(wanted, buffer if products is None else products, x, slots, tables.gates)
        close(compiled(buffer, products), wanted * 2)


def test_the_operation_launches_nothing_while_shapes_are_traced(monkeypatch):
    monkeypatch.setattr(op, "_kernel", lambda: pytest.fail("launched"))
    *tensors, tables = arguments(False, "cpu")
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        faked = [None if one is None else mode.from_tensor(one) for one in (*tensors, tables.ints, tables.numbers)]
        assert torch.ops.molora.route_ranks(*faked, tables.experts) is None


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
def test_a_captured_graph_follows_slots_and_what_they_hold():
    tables = mixed_tables(3, "cuda")
    given = mixed_products(tables, MIXED_SLOTS).to("cuda")
    buffer, slots = given.clone(), MIXED_SLOTS.to("cuda")
    x = torch.zeros(len(slots), WIDTH, device="cuda", dtype=torch.bfloat16)
    route_ranks(buffer, buffer, x, slots, tables)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route_ranks(buffer, buffer, x, slots, tables)

    def replayed(slots_now):
        slots.copy_(slots_now)
        given = mixed_products(tables, slots_now).to("cuda")
        buffer.copy_(given)
        graph.replay()
        wanted = given.clone()
        reference(wanted, given, x, slots, tables.gates)
        close(buffer, wanted)

    replayed(MIXED_SLOTS)
    for index in range(3):
        tables.write(0, index, GATES["sparsemixer"])
        tables.write(2, index, None)
        tables.write(4, index, GATES["one expert"])
    replayed(MIXED_SLOTS)
    replayed(MIXED_SLOTS.flip(0))
