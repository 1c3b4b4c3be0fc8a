"""One module's routing decision: gather what the router reads, ask it, and turn the logits into weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molora.errors import MoloraError
from molora.routing import RouterInput, Routing, RoutingExtras, fixed, route
from molora.routing.inputs import rows_of
from molora.routing.masks import pool_last, pool_mean
from molora.routing.precision import promote
from molora.routing.scope import RoutingCall
from molora.routing.weights import with_shared

if TYPE_CHECKING:
    from molora.bank import MoLoraLayer
    from molora.plan import ModulePlan

BASE_HIDDEN = "base_hidden"
"""Key in `RoutingCall.shared` of the base model's last hidden states, `[B, S, d]`."""

_FEATURES = frozenset({"input", "hidden", "state"})


def decide(layer: MoLoraLayer, name: str, x: Tensor, hidden: Tensor, rows: list[int] | None) -> Routing | None:
    """Decide how much each expert counts for each token.

    Args:
        layer: The adapted module.
        name: Name of the adapter.
        x: What the module's experts read, `[..., in]`.
        hidden: `A x`, `[..., R]`.
        rows: Which rows of the call's batch these are; `None` for all.

    Returns:
        The decision, or `None` if every expert counts fully.

    Raises:
        MoloraError: If something the router reads was not given.
    """
    plan = layer.molora_plan[name]
    if plan.router == "none":
        return None
    call = layer.routing_scope.current() if layer.routing_scope is not None else None
    group = layer.molora_group.get(name)
    follows = group is not None and group.decides_once and group.leader is not layer
    # What depends on no features any module can look up, where the first one is in a part that does not run again,
    # such as an encoder while text is generated.
    if group is not None and follows and (plan.reads & _FEATURES or group.has_decided(name, call)):
        return group.take(name, call)
    given = None if call is None else call.inputs.expert_weights
    if given is not None and call is not None:
        routing = _given(given, plan, x, call, rows)
    else:
        routing = _Decision(layer, name, plan, x, hidden, call, rows).routing()
    if group is not None and group.decides_once and group.leader is layer:
        group.put(name, call, routing)
    if layer.routing_recorder is not None and plan.reads and given is None:
        seen = _flat(routing, x)
        layer.routing_recorder.append(layer.routing_name, name, seen, plan.ranks, plan.spec.null_experts)
    return routing


def _flat(routing: Routing, x: Tensor) -> Routing:
    """A decision with several weight vectors per row has them in place of tokens."""
    if routing.logits.ndim <= x.ndim:
        return routing
    parts = ("logits", "probabilities", "selected", "weights")
    return replace(routing, **{part: getattr(routing, part).flatten(1, -2) for part in parts})


def _given(weights: Tensor, plan: ModulePlan, x: Tensor, call: RoutingCall, rows: list[int] | None) -> Routing:
    """The weights the caller insists on."""
    weights = promote(weights.to(x.device))
    if weights.shape[-1] == plan.num_experts:
        weights = with_shared(weights, plan.spec.shared_experts, plan.spec.shared_weight)
    if weights.shape[-1] != plan.bank_experts:
        raise MoloraError(
            f"expert_weights has {weights.shape[-1]} columns and this adapter {plan.num_experts} experts; "
            "give one each."
        )
    if weights.ndim > 1:
        weights = _over_tokens(_rows(weights, "expert_weights", x, call, rows), x, plan)
    return fixed(weights, per_sequence=weights.ndim > 1)


def _rows(values: Tensor, what: str, x: Tensor, call: RoutingCall, rows: list[int] | None) -> Tensor:
    """Per-row values for the rows of this layer's batch."""
    if rows is not None:
        return rows_of(values, call.batch or len(values), call.kept is not None, what)[rows]
    return rows_of(values, x.shape[0], call.kept is not None, what)


def _over_tokens(values: Tensor, x: Tensor, plan: ModulePlan | None = None) -> Tensor:
    """Put the dimensions of the tokens behind that of the rows: `[B, ...]` to `[B, 1, ...]`.

    With a plan the last dimension is the experts', and that of the splits comes before it, if there are any.
    """
    splits = plan is not None and plan.num_splits > 1
    return values.reshape(values.shape[0], *[1] * (x.ndim - 2 + splits), *values.shape[1:])


def _wrong_prompt(mask: Tensor, x: Tensor) -> MoloraError:
    return MoloraError(f"prompt_mask has {mask.shape[1]} columns and the input {x.shape[1]} tokens; give one each.")


def _part(container: nn.ModuleDict, name: str) -> Any:
    return container[name] if name in container else None  # noqa: SIM401  # a ModuleDict has no get


class _Decision:
    """Everything one decision is made from."""

    def __init__(
        self,
        layer: MoLoraLayer,
        name: str,
        plan: ModulePlan,
        x: Tensor,
        hidden: Tensor,
        call: RoutingCall | None,
        rows: list[int] | None,
    ) -> None:
        self.layer, self.name, self.plan = layer, name, plan
        self.x, self.hidden, self.call, self.rows = x, hidden, call, rows
        self.spec = layer.molora_spec[name]

    def routing(self) -> Routing:
        """Ask the router and turn its logits into weights."""
        kept = None if self.call is None else self.call.kept
        key = (id(self.layer), self.name)
        if self.plan.per_sequence and kept is not None and key in kept:
            return kept[key]
        routing = self._fresh()
        if self.plan.per_sequence and not self._scored_by_token():
            routing = replace(routing, per_sequence=True)
            if kept is not None:
                kept[key] = routing
        return routing

    def _fresh(self) -> Routing:
        layer, name, reads = self.layer, self.name, self.plan.reads
        router = layer.router_of(name)
        features = self._features() if reads & {"input", "state"} else None
        scores = self._scores() if "scores" in reads else None
        given = RouterInput(
            features,
            self.hidden,
            layer.molora_ranks[name].expert,
            self._task_ids() if "task" in reads else None,
            scores,
            self._state() if "state" in reads else None,
        )
        logits = router(given)
        if "state" in reads:
            logits, state = logits
            self._needed_call("a recurrent router").shared["state", name, id(layer)] = state
        threshold, bias = _part(layer.molora_threshold, name), _part(layer.molora_bias, name)
        blend = _part(layer.molora_blend, name)
        mix, factor = (None, None) if blend is None else blend()
        extras = RoutingExtras(
            threshold_logit=None if threshold is None else threshold(features),
            bias=None if bias is None else bias(),
            scores=scores,
            allowed=self._allowed(),
            mix=mix,
            mask=self._real_tokens(logits) if self.spec.capacity_factor is not None else None,
            training=layer.training,
        )
        routing = route(logits, self.spec, extras)
        return routing if factor is None else replace(routing, weights=routing.weights * factor)

    def _needed_call(self, what: str) -> RoutingCall:
        if self.call is None:
            raise MoloraError(
                f"{what} needs to know the whole forward pass; call the model as a whole, or open "
                "`molora.routing_inputs(model)` around it."
            )
        return self.call

    def _features(self) -> Tensor:
        """What the router reads, `[..., in]`; one vector per row for decisions about sequences."""
        x, call = self.x, self.call
        if self.plan.router_input == "base":
            call = self._needed_call("router_input='base'")
            if BASE_HIDDEN not in call.shared:
                raise MoloraError(
                    "router_input='base' per token cannot decode with a cache; generate with use_cache=False, or set "
                    "router_level='sequence'."
                )
            x = self._of_rows(call.shared[BASE_HIDDEN])
        x = promote(x)
        if self.plan.level == "sequence":
            if x.ndim != 3:
                raise MoloraError(f"router_level='sequence' needs inputs [B, S, d], got {list(x.shape)}.")
            call = self._needed_call("router_level='sequence'")
            if call.decoded and call.kept is None:
                raise MoloraError(
                    "a sequence-level router cannot decode with a cache it did not see being filled; generate with "
                    "the PEFT model's own `generate`, or inside `molora.routing_inputs(model, generating=True)`."
                )
            pool = pool_last if self.plan.router_input == "base" else pool_mean
            x = pool(x, self._prompt(x))
        if self.spec.router_jitter and self.layer.training and self.spec.selection != "sparsemixer":
            x = x * torch.empty_like(x).uniform_(1 - self.spec.router_jitter, 1 + self.spec.router_jitter)
        return x

    def _prompt(self, x: Tensor) -> Tensor | None:
        """`[B, S]`, the tokens a decision about a sequence reads."""
        call = self._needed_call("router_level='sequence'")
        if call.prompt is not None and call.prompt.shape[1] >= x.shape[1]:
            if call.inputs.prompt_mask is not None and call.prompt.shape[1] != x.shape[1]:
                raise _wrong_prompt(call.prompt, x)
            mask = rows_of(call.prompt, call.batch or len(call.prompt), call.kept is not None, "prompt_mask")
            return self._of_rows(mask[:, -x.shape[1] :].bool().to(x.device))
        if call.inputs.prompt_mask is not None:
            raise _wrong_prompt(call.inputs.prompt_mask, x)
        mask = call.masks.of_layer(self.layer.routing_name, torch.Size([call.batch or x.shape[0], x.shape[1]]))
        return None if mask is None else self._of_rows(mask.to(x.device))

    def _of_rows(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    def _real_tokens(self, logits: Tensor) -> Tensor | None:
        if self.call is None or self.plan.per_sequence:
            return None
        return self.call.masks.of_layer(self.layer.routing_name, logits.shape[:-1])

    def _given(self, what: str) -> Tensor:
        value = None if self.call is None else getattr(self.call.inputs, what)
        if value is None:
            shape = {"task_ids": "an integer per row, [B]", "expert_scores": "a number per row and expert, [B, E]"}
            raise MoloraError(
                f"this adapter's routing reads {what}, and none were given. Pass `{what}=` ({shape[what]}) to the "
                f"model's forward or generate, or open `molora.routing_inputs(model, {what}=...)` around it; molora's "
                f"trainers take a `{what}` column of the dataset."
            )
        assert self.call is not None
        return _rows(value.to(self.x.device), what, self.x, self.call, self.rows)

    def _task_ids(self) -> Tensor:
        return _over_tokens(self._given("task_ids").long(), self.x)

    def _scores(self) -> Tensor:
        scores = promote(self._given("expert_scores"))
        experts = self.plan.num_experts + self.spec.null_experts
        if scores.shape[-1] != experts:
            raise MoloraError(
                f"expert_scores has {scores.shape[-1]} columns and this adapter {experts} experts"
                + " with its null ones" * bool(self.spec.null_experts)
                + "; give one each."
            )
        if scores.ndim == 2:
            return _over_tokens(scores, self.x, self.plan)
        assert self.call is not None
        length, written = self.x.shape[1], self.call.kept is not None and self.call.decoded
        if scores.shape[1] < length or (written and scores.shape[1] != length):
            raise MoloraError(
                f"expert_scores of {scores.shape[1]} tokens do not reach the {length} tokens of this pass or those "
                "yet to be generated; give one vector per row, [B, E]."
            )
        return scores[:, -length:]

    def _scored_by_token(self) -> bool:
        scores = None if self.call is None else self.call.inputs.expert_scores
        return "scores" in self.plan.reads and scores is not None and scores.ndim > 2

    def _state(self) -> Tensor | None:
        before = self.layer.molora_before.get(self.name)
        if before is None:
            return None
        return self._needed_call("a recurrent router").shared.get(("state", self.name, id(before)))

    def _allowed(self) -> Tensor | None:
        mask = None if self.call is None else self.call.inputs.expert_mask
        if mask is None:
            return None
        mask = mask.bool().to(self.x.device)
        experts = self.plan.num_experts
        if mask.shape[-1] != experts:
            raise MoloraError(f"expert_mask has {mask.shape[-1]} columns and this adapter {experts} experts.")
        if self.spec.null_experts:
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], self.spec.null_experts)], dim=-1)
        if mask.ndim == 1:
            return mask
        assert self.call is not None
        return _over_tokens(_rows(mask, "expert_mask", self.x, self.call, self.rows), self.x, self.plan)
