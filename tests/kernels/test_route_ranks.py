"""The kernel that routes and scales a server's rank rows, against `molora.routing.route` slot by slot."""

import pytest
import torch
from kernels.cases import DEVICES
from kernels.gates import (
    GATES,
    MIXED_SLOTS,
    NAN,
    RANKS,
    TOKENS,
    WIDTH,
    both,
    close,
    gate,
    mixed_products,
    mixed_tables,
    products_of,
    tokens_of,
)

from molora.serving.gate import Gate, rank_gate
from molora.serving.op import route_ranks
from molora.serving.tables import SlotTables

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
"""The interpreter's numpy speaks up about NaN and infinity that a selection then leaves out, as it should."""


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
