"""What the caller of the model gave, for the rows and tokens of one adapted module."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.errors import MoloraError
from molora.plan import ModulePlan
from molora.routing import Routing, fixed
from molora.routing.inputs import rows_of
from molora.routing.masks import ids_of_tokens
from molora.routing.precision import promote
from molora.routing.scope import RoutingCall
from molora.routing.weights import with_shared


def given_weights(weights: Tensor, plan: ModulePlan, x: Tensor, call: RoutingCall, rows: list[int] | None) -> Routing:
    """The weights the caller insists on."""
    weights = promote(weights.to(x.device))
    if weights.shape[-1] == plan.num_experts:
        weights = with_shared(weights, plan.spec.shared_experts, plan.spec.shared_weight)
    if weights.shape[-1] != plan.bank_experts:
        raise MoloraError(
            f"expert_weights has {weights.shape[-1]} columns and this adapter {plan.num_experts} experts"
            + f", {plan.bank_experts} with its shared ones" * (plan.bank_experts > plan.num_experts)
            + "; give one each."
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


class Given:
    """The routing inputs of the call that runs, as one module needs them.

    Args:
        name_of_layer: Name of the module inside the model.
        plan: What of the adapter concerns it.
        x: What its experts read, `[..., in]`.
        call: The call; `None` if the model's own hook did not see one.
        rows: Which rows of the call's batch these are; `None` for all.
    """

    def __init__(
        self, name_of_layer: str, plan: ModulePlan, x: Tensor, call: RoutingCall | None, rows: list[int] | None
    ) -> None:
        self.name_of_layer, self.plan, self.x, self.call, self.rows = name_of_layer, plan, x, call, rows

    def needed_call(self, what: str) -> RoutingCall:
        """The call, for what cannot do without it."""
        if self.call is None:
            raise MoloraError(
                f"{what} needs to know the whole forward pass; call the model as a whole, or open "
                "`molora.routing_inputs(model)` around it."
            )
        return self.call

    def prompt(self, x: Tensor) -> Tensor | None:
        """`[B, S]`, the tokens a decision about a sequence reads."""
        call = self.needed_call("router_level='sequence'")
        if call.prompt is not None and call.prompt.shape[1] >= x.shape[1]:
            if call.inputs.prompt_mask is not None and call.prompt.shape[1] != x.shape[1]:
                raise _wrong_prompt(call.prompt, x)
            mask = rows_of(call.prompt, call.batch or len(call.prompt), call.kept is not None, "prompt_mask")
            return self.of_rows(mask[:, -x.shape[1] :].bool().to(x.device))
        if call.inputs.prompt_mask is not None:
            raise _wrong_prompt(call.inputs.prompt_mask, x)
        mask = call.masks.of_layer(self.name_of_layer, torch.Size([call.batch or x.shape[0], x.shape[1]]))
        return None if mask is None else self.of_rows(mask.to(x.device))

    def of_rows(self, values: Tensor) -> Tensor:
        """Values of the batch's rows, for those of this module."""
        return values if self.rows is None else values[self.rows]

    def real_tokens(self, logits: Tensor) -> Tensor | None:
        """Which tokens are no padding, in the shape of the logits without the experts; `None` for all."""
        if self.call is None or self.plan.per_sequence:
            return None
        return self.call.masks.of_layer(self.name_of_layer, logits.shape[:-1])

    def _value(self, what: str) -> Tensor:
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

    def task_ids(self) -> Tensor:
        """The task of each row, shaped to broadcast against the tokens, or of each token."""
        tasks = self.tasks_of_tokens()
        if tasks is None:
            return _over_tokens(self._value("task_ids").long(), self.x)
        # Where tasks alone decide, each decides once: its noise is not to differ from token to token.
        return torch.arange(self.plan.num_tasks, device=tasks.device) if self.plan.reads == {"task"} else tasks

    def tasks_of_tokens(self) -> Tensor | None:
        """The task of each token, `[B, S]`; `None` if rows have one each."""
        ids = None if self.call is None or "task" not in self.plan.reads else self.call.inputs.task_ids
        if ids is None or ids.ndim == 1:
            return None
        return ids_of_tokens(self.of_rows(ids.to(self.x.device)), self.x.shape[:-1])

    def scores(self) -> Tensor:
        """External scores, `[..., E]`, shaped to broadcast against the tokens."""
        scores = promote(self._value("expert_scores"))
        experts = self.plan.num_experts + self.plan.spec.null_experts
        if scores.shape[-1] != experts:
            raise MoloraError(
                f"expert_scores has {scores.shape[-1]} columns and this adapter {experts} experts"
                + " with its null ones" * bool(self.plan.spec.null_experts)
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

    def scored_by_token(self) -> bool:
        """Whether there are scores for each token."""
        scores = None if self.call is None else self.call.inputs.expert_scores
        return "scores" in self.plan.reads and scores is not None and scores.ndim > 2

    def allowed(self) -> Tensor | None:
        """Which experts may be used, `[E]` or shaped to broadcast against the tokens; `None` for all."""
        mask = None if self.call is None else self.call.inputs.expert_mask
        if mask is None:
            return None
        mask = mask.bool().to(self.x.device)
        experts = self.plan.num_experts
        if mask.shape[-1] != experts:
            raise MoloraError(f"expert_mask has {mask.shape[-1]} columns and this adapter {experts} experts.")
        if self.plan.spec.null_experts:
            mask = torch.cat([mask, mask.new_ones(*mask.shape[:-1], self.plan.spec.null_experts)], dim=-1)
        if mask.ndim == 1:
            return mask
        assert self.call is not None
        return _over_tokens(_rows(mask, "expert_mask", self.x, self.call, self.rows), self.x, self.plan)
