"""Mixtures of LoRA experts as loops over experts, the way published code computes them, for comparison.

Both hold the weights of a molora layer and compute the same function, so that they can be checked against it.
"""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional


class ExpertLoop(nn.Module):
    """What both loops have: a frozen linear, a router, and a pair of LoRA factors for each expert.

    Args:
        base: The frozen linear.
        weights: `molora_A.weight` `[R, in]`, `molora_B.weight` `[out, R]`, `molora_router.weight` `[E, in]` and, for
            learned thresholds, those of `molora_threshold`.
        scale: Factor of every expert.
    """

    def __init__(self, base: nn.Linear, weights: dict[str, Tensor], scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.router = nn.Parameter(weights["molora_router.weight"].clone())
        experts = len(self.router)
        self.downs = nn.ParameterList(part.clone() for part in weights["molora_A.weight"].chunk(experts))
        self.ups = nn.ParameterList(part.clone() for part in weights["molora_B.weight"].chunk(experts, dim=1))

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert adds, `[t, in]` to `[t, out]`."""
        return functional.linear(functional.linear(x, self.downs[index]), self.ups[index]) * self.scale

    def mixture(self, x: Tensor) -> Tensor:
        """What all experts add, `[T, in]` to `[T, out]`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        return self.base(x) + self.mixture(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class AdamoleLoop(ExpertLoop):
    """Adaptive thresholds with the control flow of AdaMoLE's code (arXiv 2405.00361).

    As there, the first expert runs on all tokens, for nothing but the shape of the result.
    """

    def __init__(self, base: nn.Linear, weights: dict[str, Tensor], scale: float) -> None:
        super().__init__(base, weights, scale)
        self.threshold = nn.Parameter(weights["molora_threshold.weight"].clone())
        self.threshold_bias = nn.Parameter(weights["molora_threshold.bias"].clone())

    def mixture(self, x: Tensor) -> Tensor:
        """See `ExpertLoop`."""
        probabilities = functional.linear(x.float(), self.router.float()).softmax(dim=-1)
        level = functional.linear(x.float(), self.threshold.float(), self.threshold_bias.float()).sigmoid()
        above = probabilities - level / len(self.downs)
        selected = above >= 0
        weights = above * selected
        total = weights.sum(dim=-1, keepdim=True)
        weights = (weights / torch.where(total == 0, torch.ones_like(total), total)).to(x.dtype)
        result = torch.zeros_like(self.expert(0, x))
        for index in range(len(self.downs)):
            tokens = torch.where(selected[:, index])[0]
            result[tokens] += weights[tokens, index, None] * self.expert(index, x[tokens])
        return result


class TopKLoop(ExpertLoop):
    """Top-k with the control flow of Mixtral's code: a mask per expert, gather, `index_add_`."""

    top_k = 2

    def mixture(self, x: Tensor) -> Tensor:
        """See `ExpertLoop`."""
        probabilities = functional.linear(x.float(), self.router.float()).softmax(dim=-1)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(x.dtype)
        masks = functional.one_hot(chosen, len(self.downs)).permute(2, 1, 0)
        result = x.new_zeros(len(x), self.base.out_features)
        for index in range(len(self.downs)):
            place, tokens = torch.where(masks[index])
            result.index_add_(0, tokens, self.expert(index, x[tokens]) * weights[tokens, place, None])
        return result


def as_loop(model: PeftModel, kind: type[ExpertLoop], scale: float, top_k: int = 2) -> nn.Module:
    """The base model of a molora model with a loop in place of every adapted linear, with copies of its weights.

    Args:
        model: A molora model with a router per linear and the layout `separate`. Its layers are replaced.
        kind: Which loop.
        scale: `lora_alpha / r`.
        top_k: Experts per token, for `TopKLoop`.
    """
    state = get_peft_model_state_dict(model)
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        layer, _, name = key.partition(".molora_")
        by_layer.setdefault(layer.removeprefix("base_model.model."), {})[f"molora_{name}"] = value
    base = model.get_base_model()
    for path, weights in by_layer.items():
        parent, _, leaf = path.rpartition(".")
        layer = kind(getattr(base.get_submodule(parent), leaf).get_base_layer(), weights, scale)
        if isinstance(layer, TopKLoop):
            layer.top_k = top_k
        setattr(base.get_submodule(parent), leaf, layer)
    return base
