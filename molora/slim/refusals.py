"""Which adapters cannot be slimmed in which way: all reasons at once, before anything is computed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

from molora.config import MoLoraConfig
from molora.errors import ConfigError, Problem
from molora.lifecycle import start_fields
from molora.plan import most_experts, routing_reads

PRUNE, DROP, RANKS, RERANK, MERGE = "prune experts", "drop experts", "prune ranks", "re-rank experts", "merge experts"

_LAYOUTS: dict[str, dict[str, str]] = {
    "pairs": dict.fromkeys((PRUNE, DROP, RANKS, RERANK, MERGE), "an expert is a pair of a row of A and a column of B"),
    "shards": dict.fromkeys((PRUNE, DROP, RANKS, RERANK, MERGE), "matrices are drawn from pools that modules share"),
    "factors": {
        PRUNE: "the experts' matrices are summed, so all need the same rank; drop experts everywhere instead",
        RANKS: "the experts' matrices are summed, so ranks of one expert mean nothing alone",
        RERANK: "the experts' matrices are summed, so an expert's own product means nothing",
        MERGE: "the experts' matrices are summed, so an expert's own product means nothing",
    },
    "shared_A": {
        PRUNE: "all experts have the rank of the A they share; drop experts everywhere instead",
        RERANK: "the best A of each expert is another one; prune the ranks they share instead",
    },
}
"""Why a layout cannot; where it can, it is left out."""


def check_slimming(config: MoLoraConfig, operation: str) -> None:
    """Refuse what cannot be done to an adapter.

    Args:
        config: Its config.
        operation: One of the names above.

    Raises:
        ConfigError: Listing every reason.
    """
    problems = list(_reasons(config, operation))
    if problems:
        raise ConfigError(problems, f"cannot {operation} of this adapter")


def check_smaller(config: MoLoraConfig, number: int) -> None:
    """Refuse a number of experts that the other choices do not allow, such as fewer than `top_k`.

    Args:
        config: The config before.
        number: Routed experts that would be left.

    Raises:
        ConfigError: Listing every reason.
    """
    r = config.r if isinstance(config.r, int) else max(config.r)
    fields = {"num_experts": number, "r": r, "rank_pattern": {}, "frozen_experts": 0, "imported_experts": None}
    fields |= start_fields(config, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is only unwise is said when it is done
        dataclasses.replace(config, **fields)  # type: ignore[arg-type]  # which mypy checks as one type


def _reasons(config: MoLoraConfig, operation: str) -> Iterator[Problem]:
    layout, reads = config.expert_layout, routing_reads(config)
    if operation in _LAYOUTS.get(layout, {}):
        yield Problem("expert_layout", f"{layout!r}: {_LAYOUTS[layout][operation]}.")
    if operation in (PRUNE, DROP, MERGE) and (config.router == "none" or most_experts(config.num_experts) == 1):
        yield Problem(
            "num_experts", "there is one expert, and nothing to choose from; prune ranks or re-rank instead."
        )
    if operation == DROP and not isinstance(config.num_experts, int):
        yield Problem(
            "num_experts", "experts with an index everywhere need the same number in all layers; prune them."
        )
    if operation != DROP and "hidden" in reads:
        yield Problem(
            "router",
            f"{config.router!r} routes by the experts' own A, so any other change of them changes the routing.",
        )
    if operation == MERGE and "scores" in reads:
        yield Problem("router", "routing reads `expert_scores`, one number per expert, which molora cannot merge.")
    if operation in (RERANK, MERGE) and layout == "separate":
        for name in ("expert_activation", "expert_bias"):
            if getattr(config, name):
                yield Problem(
                    name, "an expert is no product of two matrices, so none of a lower rank is the best one."
                )
