"""Gates that the kernel of served mixtures must express, and what it is given in tests."""

from dataclasses import replace

import torch

from molora.routing import RoutingSpec
from molora.serving.gate import Gate
from molora.serving.op import reference, route_ranks
from molora.serving.tables import SlotTables

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
