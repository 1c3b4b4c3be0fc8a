"""How a served mixture's gate is written down for a kernel: a row of integers and a row of fp32 numbers.

    integers:  [each of INTEGERS | first rank of each logit's expert [E] | its rank [E]  | expert of each rank [R]]
    numbers:   [each of NUMBERS  | offset of each logit [E] | its balancing bias [E]     | scale of each rank [R]]

E and R are the sizes of the table here, the most that a gate may have. Triton is not needed to read this.
"""

from __future__ import annotations

OFF, PLAIN, ROUTED = 0, 1, 2
"""What a slot does to rank rows: zero them, leave them, route."""

INTEGERS = (
    "mode",
    "rank",  # of all experts together
    "logits",
    "null",
    "first",  # row that logits come from
    "rows",  # from there to the same of the next part
    "parts",
    "learned",  # whether the last row of each part, behind the experts', is a threshold's
    "source",
    "input_scale",
    "normed",  # whether logits are standardised
    "gate",
    "selection",
    "top_k",
    "groups",
    "weights",
    "renormalize",
    "remainder",  # whether shared experts get what the others leave, instead of one
)
NUMBERS = (
    "gate_temperature",
    "temperature",  # of the logits that `selected_softmax` weighs by
    "level",
    "max_threshold",
    "threshold_offset",
    "top_p",
    "top_gap",
    "min_logit",
    "logit_norm",
    "reach",  # how far from the best one a competing expert of `sparsemixer` may be
)

INTEGER_PLACES = {name: place for place, name in enumerate(INTEGERS)}
NUMBER_PLACES = {name: place for place, name in enumerate(NUMBERS)}

SOURCE_CODES = {"rows": 0, "magnitude": 1, "activation": 2, "unit_activation": 3, "activation_norm": 4}
INPUT_SCALE_CODES = {None: 0, "standardize": 1, "normalize": 2}
GATE_CODES = {
    "softmax": 0,
    "gumbel_softmax": 0,
    "sigmoid": 1,
    "relaxed_bernoulli": 1,
    "relu": 2,
    "sparsemax": 3,
    "identity": 4,
}
"""Without the noise of training two pairs are the same, except that `relaxed_bernoulli` then has no temperature."""

SELECTION_CODES = {
    "dense": 0,
    "top_k": 1,
    "top_k_magnitude": 2,
    "top_p": 3,
    "threshold": 4,
    "adaptive_threshold": 4,
    "top_1_or_2": 5,
    "grouped_top_1": 6,
    "sparsemixer": 7,
}
WEIGHT_CODES = {
    "probability": 0,
    "probability_minus_threshold": 1,
    "biased_probability": 2,
    "selected_softmax": 3,
    "one": 4,
}

MOST_LOGITS = 128
"""More would take more registers than a program has without spilling."""


def row_widths(experts: int, ranks: int) -> tuple[int, int]:
    """Length of the row of integers and of the row of numbers.

    Args:
        experts: E of the table.
        ranks: R of the table.
    """
    return len(INTEGERS) + 2 * experts + ranks, len(NUMBERS) + 2 * experts + ranks
