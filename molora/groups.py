"""Modules that route together: one of them holds the router, and perhaps decides for all."""

from __future__ import annotations

from typing import Any

import torch

from molora.errors import MoloraError
from molora.routing import Routing
from molora.routing.scope import RoutingCall


class RoutingGroup:
    """The adapted modules of one adapter that share a router.

    Args:
        name: What they have in common, for error messages: a block's name, or "the model".
        decides_once: The first module decides for all; otherwise they share parameters only.
        feature_size: Size of what the router reads.
        spans_ffn: The modules are those of a feed-forward block, and an expert spans all of them.

    Attributes:
        members: The modules (`MoLoraLayer`) in the order of the model; the first holds the router.
    """

    def __init__(self, name: str, decides_once: bool, feature_size: int, spans_ffn: bool = False) -> None:
        self.spans_ffn = spans_ffn
        self.name = name
        self.decides_once = decides_once
        self.feature_size = feature_size
        self.members: list[Any] = []
        self._decision: Routing | None = None
        self._unread = 0

    @property
    def leader(self) -> Any:
        """The module that holds the router."""
        return self.members[0]

    def put(self, adapter_name: str, call: RoutingCall | None, routing: Routing) -> None:
        """Keep the leader's decision for the other modules of this forward pass."""
        if call is not None:
            call.shared[adapter_name, id(self)] = routing
        elif len(self.members) > 1:
            self._decision, self._unread = routing, len(self.members) - 1

    def has_decided(self, adapter_name: str, call: RoutingCall | None) -> bool:
        """Whether there is a decision to take."""
        return (self._decision if call is None else call.shared.get((adapter_name, id(self)))) is not None

    def take(self, adapter_name: str, call: RoutingCall | None, tokens: torch.Size) -> Routing:
        """The leader's decision.

        Args:
            adapter_name: Name of the adapter.
            call: The call that runs.
            tokens: Shape of the tokens it is for.

        Raises:
            MoloraError: If the leader has not run, or decided about other tokens.
        """
        routing = self._decision if call is None else call.shared.get((adapter_name, id(self)))
        if routing is None:
            raise MoloraError(
                f"the router shared by {self.name} has not run yet in this forward pass: its first adapted module was "
                "skipped. Share within smaller parts (router_sharing='block' or 'none')."
            )
        decided = routing.weights.shape[:-1]
        if len(decided) == len(tokens) and any(n not in (1, m) for n, m in zip(decided, tokens, strict=True)):
            raise MoloraError(
                f"the router shared by {self.name} decided about tokens of shape {list(decided)}, and is asked about "
                f"{list(tokens)}: these modules do not read the same input. Set router_sharing='none'."
            )
        if call is None:
            # The last one to read lets go of it, and with it of the graph behind it.
            self._unread -= 1
            if not self._unread:
                self._decision = None
        return routing

    def is_last(self, layer: Any) -> bool:
        """Whether a module is the one whose output leaves the group."""
        return self.members[-1] is layer

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of a graph cannot be copied, and nobody needs an old decision.
        return {**self.__dict__, "_decision": None, "_unread": 0}
