"""The kernel that routes and scales a server's rank rows, against `molora.routing.route` slot by slot."""

from dataclasses import replace

import pytest
import torch
from kernels.cases import DEVICES, HAS_GPU

from molora.errors import MoloraError
from molora.routing import RoutingSpec
from molora.serving import op
from molora.serving.gate import Gate, rank_gate
from molora.serving.op import reference, route_ranks
from molora.serving.tables import SlotTables, why_not

pytest.importorskip("triton")

from molora.kernels.triton import common

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter's numpy speaks up about NaN and infinity that a selection then leaves out, as it should."""

TOP_2 = RoutingSpec(
    gate="softmax",
    selection="top_k",
    weights="probability",
    renormalize=True,
    temperature=1.0,
    top_k=2,
    top_p=0.6,
    threshold=0.2,
    max_threshold=0.4,
)
NAN = float("nan")


def gate(ranks=(3,) * 6, logits=None, scales=None, balanced=False, offset=False, threshold_offset=None, **fields):
    """A gate; fields that are not those of `Gate` are those of its spec."""
    own = {name: fields.pop(name) for name in ("source", "parts", "input_scale") if name in fields}
    spec = replace(TOP_2, **fields)
    logits = len(ranks) - spec.shared_experts + spec.null_experts if logits is None else logits
    drawn = torch.Generator().manual_seed(3)
    return Gate(
        spec,
        tuple(ranks),
        tuple(scales or [0.5] * len(ranks)),
        logits,
        offset=torch.randn(logits, generator=drawn) if offset else None,
        threshold_offset=None if threshold_offset is None else torch.tensor([threshold_offset]),
        balance=torch.randn(logits, generator=drawn) * 0.2 if balanced else None,
        **own,
    )


UNEQUAL = {"ranks": (1, 4, 2, 0, 5, 3), "scales": (0.5, 1.0, 2.0, 1.0, 0.25, 3.0)}
ONES = {"ranks": (1,) * 9}
LEARNED = {"selection": "adaptive_threshold"}
MINUS = {"weights": "probability_minus_threshold"}

GATES = {
    "top 2": gate(),
    "top 2, bf16 parts": gate(parts=3, offset=True),
    "top 2, temperature, offset": gate(temperature=0.3, offset=True, renormalize=False),
    "top 2, unequal ranks and scales": gate(**UNEQUAL),
    "top 2 of a balanced sigmoid": gate(gate="sigmoid", balanced=True),
    "all of six": gate(top_k=6),
    "one expert": gate((5,), gate="sigmoid", selection="dense", renormalize=False),
    "dense softmax": gate(selection="dense", temperature=2.0),
    "dense sigmoid, minus threshold": gate(gate="sigmoid", selection="dense", renormalize=False, **MINUS),
    "dense relu": gate(gate="relu", selection="dense"),
    "dense relu, selected softmax": gate(gate="relu", selection="dense", weights="selected_softmax", temperature=0.5),
    "dense sparsemax, ones": gate(gate="sparsemax", selection="dense", weights="one", renormalize=False),
    "sparsemax, temperature": gate(gate="sparsemax", selection="dense", renormalize=False, temperature=3.0),
    "identity": gate(gate="identity", selection="dense", renormalize=False, temperature=2.0),
    "identity, by magnitude": gate(gate="identity", selection="top_k_magnitude", renormalize=False),
    "gumbel softmax": gate(gate="gumbel_softmax", temperature=0.5, renormalize=False),
    "relaxed bernoulli": gate(gate="relaxed_bernoulli", temperature=0.2, renormalize=False),
    "relaxed bernoulli, selected softmax": gate(
        gate="relaxed_bernoulli", temperature=0.2, weights="selected_softmax", renormalize=False
    ),
    "top p": gate(selection="top_p"),
    "top p of a balanced sigmoid": gate(gate="sigmoid", selection="top_p", balanced=True, renormalize=False),
    "top p of next to nothing": gate(selection="top_p", top_p=1e-6, renormalize=False),
    "threshold": gate(selection="threshold"),
    "threshold, minus threshold": gate(selection="threshold", **MINUS),
    "threshold that nothing reaches": gate(selection="threshold", threshold=0.99, weights="selected_softmax"),
    "learned threshold": gate(**LEARNED, **MINUS, threshold_offset=-0.5),
    "learned threshold, sigmoid, fp16 parts": gate(**LEARNED, gate="sigmoid", parts=2, max_threshold=0.9),
    "top 1 or 2": gate(selection="top_1_or_2", top_gap=0.1, renormalize=False),
    "grouped top 1": gate(selection="grouped_top_1", expert_groups=3, renormalize=False),
    "sparsemixer": gate(selection="sparsemixer", router_jitter=0.1, renormalize=False),
    "sparsemixer, wide": gate(selection="sparsemixer", router_jitter=0.9, renormalize=False, top_k=4),
    "biased probability": gate(weights="biased_probability", balanced=True),
    "selected softmax": gate(gate="sigmoid", weights="selected_softmax", temperature=0.5, renormalize=False),
    "ones": gate(weights="one", renormalize=False),
    "ones that share": gate(weights="one", top_k=3),
    "null experts": gate(null_experts=3, top_k=3, renormalize=False),
    "null experts, renormalised": gate(null_experts=3, top_k=3),
    "shared experts": gate((3, 2, 4, 2, 1), shared_experts=2),
    "shared experts, remainder": gate((3, 2, 4, 2, 1), shared_experts=1, shared_weight="remainder", renormalize=False),
    "null and shared experts": gate((3, 2, 4, 2), null_experts=2, shared_experts=2, top_k=3, renormalize=False),
    "least logit": gate(selection="dense", min_logit=0.1),
    "least logit, offset": gate(min_logit=0.3, offset=True, renormalize=False),
    "normed logits": gate(logit_norm=2.5, renormalize=False),
    "normed logits, least": gate(logit_norm=1.5, min_logit=0.5, selection="dense", renormalize=False),
    "normed logits of a sparsemixer": gate(logit_norm=2.0, selection="sparsemixer", renormalize=False),
    "magnitude": gate(source="magnitude", offset=True, renormalize=False),
    "activation": gate(**ONES, source="activation", gate="identity", selection="top_k_magnitude", top_k=3,
                       weights="one", renormalize=False),
    "activation, parts, learned threshold": gate(**ONES, source="activation", gate="sigmoid", parts=3, **LEARNED),
    "unit activation": gate(**ONES, source="unit_activation", gate="sigmoid", renormalize=False, top_k=4),
    "unit activation, parts": gate(**ONES, source="unit_activation", parts=2, renormalize=False, temperature=0.3),
    "activation norm": gate(source="activation_norm", renormalize=False),
    "activation norm, unequal ranks, parts": gate(**UNEQUAL, source="activation_norm", parts=3, renormalize=False),
    "activation norm, null and shared": gate(
        (3, 2, 4, 2), source="activation_norm", null_experts=2, shared_experts=1, renormalize=False
    ),
    "activation norm, threshold": gate(source="activation_norm", **LEARNED, renormalize=False),
    "standardised input": gate(input_scale="standardize", offset=True, renormalize=False),
    "standardised input, threshold": gate(input_scale="standardize", **LEARNED, threshold_offset=0.3, parts=2),
    "normalised input": gate(input_scale="normalize", offset=True, renormalize=False, temperature=0.05),
    "forty experts": gate((1,) * 40, top_k=5, renormalize=False, parts=2),
}  # fmt: skip

TOKENS, RANKS, WIDTH = 3, 130, 45


def products_of(one, tokens=TOKENS, ranks=RANKS, seed=0):
    """Like those of a gate's packed rows; every further part is smaller. NaN behind."""
    found = torch.randn(tokens, ranks, generator=torch.Generator().manual_seed(seed))
    for part in range(one.parts):
        start = one.rank + part * one.router_rows
        found[:, start : start + one.router_rows] *= 2.0 ** (-8 * part)
    found[:, one.rows :] = NAN
    return found


def tokens_of(dtype=torch.float32, tokens=TOKENS, scale=1.0):
    """`[T, in]`, not centred, of rows that lie apart."""
    wide = torch.randn(tokens, WIDTH + 3, generator=torch.Generator().manual_seed(9)) + 0.5
    return (wide * scale).to(dtype)[:, :WIDTH]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def both(buffer, products, x, slots, tables):
    """What the kernel writes, and what the definition does."""
    found, wanted = buffer.clone(), buffer.clone()
    route_ranks(found, found if products is buffer else products, x, slots, tables)
    reference(wanted, wanted if products is buffer else products, x, slots, tables.gates)
    return found, wanted


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GATES)
def test_every_choice_weighs_ranks_as_routing_says(name, device):
    one = GATES[name]
    tables = SlotTables(1, 1, RANKS, 64, device=device)
    tables.write(0, 0, one)
    buffer, x = products_of(one)[None].to(device), tokens_of().to(device)
    found, _ = both(buffer, buffer, x, torch.zeros(TOKENS, dtype=torch.int64, device=device), tables)
    hidden = buffer[0, :, : one.rank]
    close(found[0, :, : one.rank], hidden * rank_gate(buffer[0], one, x))
    assert not found[0, :, one.rank :].any()
    assert not torch.equal(found[0, :, : one.rank], hidden)


@pytest.mark.parametrize("name", GATES)
def test_the_definition_computes_on_the_device_of_its_input(name):
    one = GATES[name]
    found = rank_gate(products_of(one).to("meta"), one, tokens_of().to("meta"))
    assert found.device.type == "meta"
    assert found.shape == (TOKENS, one.rank)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", ["standardize", "normalize"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float32, 2e-3)])
def test_inputs_of_every_precision_and_of_little_deviation_are_scaled(scale, dtype, size, device):
    one = gate(input_scale=scale, renormalize=False)
    tables = SlotTables(1, 1, RANKS, 8, device=device)
    tables.write(0, 0, one)
    buffer, x = products_of(one)[None].to(device) * size, tokens_of(dtype, scale=size).to(device)
    close(*both(buffer, buffer, x, torch.zeros(TOKENS, dtype=torch.int64, device=device), tables))


MIXED = ["top 2, unequal ranks and scales", "learned threshold", "forty experts", "shared experts, remainder"]


def mixed_tables(slices, device="cpu"):
    """Mixtures, plain LoRAs, what is off and what was never written; slices differ."""
    tables = SlotTables(slices, 7, RANKS, 64, device=device)
    for index in range(slices):
        for slot, name in enumerate(MIXED[index:] + MIXED[:index]):
            tables.write(slot, index, GATES[name])
        tables.write(4, index, None)
        tables.write(5, index, "off")
    return tables


MIXED_SLOTS = torch.tensor([2, -1, 4, 0, 3, 5, 6, 1, 0, 99, 4, -1, 2])


def mixed_products(tables, slots):
    """NaN wherever nothing may be read."""
    rows = torch.full((tables.slices, len(slots), RANKS), NAN)
    for index, of_slot in enumerate(tables.gates):
        for token, slot in enumerate(slots.tolist()):
            one = of_slot[slot] if 0 <= slot < tables.slots else "off"
            if one is None:
                rows[index, token] = torch.randn(RANKS, generator=torch.Generator().manual_seed(token))
            elif one != "off":
                rows[index, token] = products_of(one, 1, seed=token)[0]
    return rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slices", [1, 3])
def test_a_batch_holds_tokens_of_every_kind_of_slot(slices, device):
    tables = mixed_tables(slices, device)
    buffer = mixed_products(tables, MIXED_SLOTS).to(device)
    # No gate of these reads the input.
    x = torch.full((len(MIXED_SLOTS), WIDTH), NAN, device=device)
    longer = torch.cat([MIXED_SLOTS, torch.tensor([1, 1])]).to(device)
    found, wanted = both(buffer, buffer, x, longer, tables)
    assert wanted.isfinite().all()
    close(found, wanted)
    without = [token for token, slot in enumerate(MIXED_SLOTS.tolist()) if slot in (-1, 5, 6, 99)]
    assert not found[:, without].any()
    plain = [token for token, slot in enumerate(MIXED_SLOTS.tolist()) if slot == 4]
    assert torch.equal(found[:, plain], buffer[:, plain])


@pytest.mark.parametrize("device", DEVICES)
def test_products_summed_elsewhere_route_and_those_of_the_buffer_are_scaled(device):
    tables = mixed_tables(2, device)
    products = mixed_products(tables, MIXED_SLOTS)
    buffer = torch.randn(products.shape, generator=torch.Generator().manual_seed(8))
    for index, of_slot in enumerate(tables.gates):
        for token, slot in enumerate(MIXED_SLOTS.tolist()):
            one = of_slot[slot] if 0 <= slot < tables.slots else None
            if isinstance(one, Gate):
                buffer[index, token, one.rank :] = NAN
                products[index, token, : one.rank] = NAN
    x = torch.zeros(len(MIXED_SLOTS), WIDTH, device=device)
    found, wanted = both(buffer.to(device), products.to(device), x, MIXED_SLOTS.to(device), tables)
    assert wanted.isfinite().all()
    close(found, wanted)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("ranks", [1, 5])
def test_small_batches_and_small_tables_are_no_error(tokens, ranks, device):
    one = gate((1,), 1, gate="sigmoid", selection="dense", renormalize=False, source="activation")
    tables = SlotTables(1, 1, ranks, device=device)
    tables.write(0, 0, one)
    buffer = products_of(one, tokens, ranks)[None].to(device)
    x = torch.zeros(tokens, 1, device=device)
    found, wanted = both(buffer, buffer, x, torch.zeros(tokens, dtype=torch.int64, device=device), tables)
    assert found.shape == (1, tokens, ranks)
    close(found, wanted)


TIES = {
    "top_k": (gate(top_k=3, renormalize=False), [0, 0, 0, 0, 0, 0], [0, 1, 2]),
    "top_k behind a best one": (gate(top_k=2, renormalize=False), [0, 0, 1, 0, 1, 1], [2, 4]),
    "top_k_magnitude": (
        gate(gate="identity", selection="top_k_magnitude", renormalize=False), [0, -2, 1, 2, 2, -2], [1, 3]
    ),
    "top_p": (gate(selection="top_p", top_p=0.5, renormalize=False), [1, 1, 1, 1, 1, 1], [0, 1, 2]),
    "top_1_or_2": (gate(selection="top_1_or_2", renormalize=False), [0, 2, 0, 2, 2, 0], [1, 3]),
    "grouped_top_1": (
        gate(selection="grouped_top_1", expert_groups=2, renormalize=False), [1, 2, 2, 3, 3, 3], [1, 3]
    ),
    "sparsemixer": (gate(selection="sparsemixer", renormalize=False), [1, 0, 1, 1, 0, 0], [0, 2]),
    "sparsemixer of zeros": (gate(selection="sparsemixer", renormalize=False, top_k=3), [0] * 6, [0, 1, 2]),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TIES)
def test_among_equals_the_first_are_kept_and_no_more(name, device):
    one, logits, kept = TIES[name]
    tables = SlotTables(1, 1, RANKS, 16, device=device)
    tables.write(0, 0, one)
    buffer = torch.ones(1, 1, RANKS, device=device)
    buffer[0, 0, one.rank : one.rank + 6] = torch.tensor(logits, dtype=torch.float32, device=device)
    route_ranks(
        buffer, buffer, tokens_of(tokens=1).to(device), torch.zeros(1, dtype=torch.int64, device=device), tables
    )
    counted = buffer[0, 0, : one.rank].unflatten(0, (6, 3)).any(dim=1)
    assert counted.nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["top 2", "dense softmax", "threshold", "top p of a balanced sigmoid", "dense relu"])
def test_a_logit_that_is_no_number_is_seen_in_its_token_and_in_no_other(name, device):
    one = GATES[name]
    tables = SlotTables(1, 1, RANKS, 8, device=device)
    tables.write(0, 0, one)
    buffer = products_of(one)[None].to(device)
    slots, x = torch.zeros(TOKENS, dtype=torch.int64, device=device), tokens_of().to(device)
    clean, _ = both(buffer, buffer, x, slots, tables)
    buffer[0, 2, one.rank + 1] = NAN
    found, _ = both(buffer, buffer, x, slots, tables)
    assert found[0, 2].isnan().any()
    others = [token for token in range(TOKENS) if token != 2]
    assert torch.equal(found[0, others], clean[0, others])


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
