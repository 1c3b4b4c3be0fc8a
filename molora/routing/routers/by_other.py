"""Routers that read something else than the features: a task, the experts' own activations, scores, or nothing."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molora.routing.precision import full_precision, promote
from molora.routing.routers.base import ROUTER_INITS, Router, RouterInput, RouterSize, linear, parameter, uniform_


class StaticRouter(Router):
    """Learned logits that do not depend on the input, so the mixture is one fixed linear map."""

    reads: ClassVar[str] = "nothing"

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        self.weight = parameter(size.num_experts)

    def forward(self, given: RouterInput | None = None) -> Tensor:
        """Return the logits `[E]`; they broadcast over tokens."""
        # A copy: under FSDP the weight's own memory is given up when this returns.
        return promote(self.weight).clone()

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Equal logits: one with `init="ones"`, else zero."""
        nn.init.constant_(self.weight, float(init == "ones"))


class TaskRouter(Router):
    """An embedding of the task or cluster, and a linear map: `W emb[id] (+ b)` (MOELoRA, arXiv 2310.18339)."""

    reads: ClassVar[str] = "task"
    default_dim: ClassVar[int | None] = 64

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        assert size.dim is not None
        self.embedding = parameter(size.num_tasks, size.dim)
        self.weight = parameter(size.num_experts, size.dim)
        self.bias = parameter(size.num_experts) if size.bias else None

    def logits(self, given: RouterInput) -> Tensor:
        """Map task ids `[...]` to logits `[..., E]`."""
        assert given.task_ids is not None
        return linear(F.embedding(given.task_ids, self.embedding), self.weight, self.bias)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Embeddings from N(0, 1) as `nn.Embedding`'s, rows as asked."""
        nn.init.normal_(self.embedding)
        ROUTER_INITS[init](self.weight, init_range)
        if self.bias is not None:
            uniform_(self.bias, self.weight.shape[1])


class TableRouter(Router):
    """One free logit per task and expert (Polytropon, arXiv 2202.13914), and per split (MHR, arXiv 2211.03831)."""

    reads: ClassVar[str] = "task"

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        self.num_splits = size.num_splits
        self.weight = parameter(size.num_tasks, size.num_splits * size.num_experts)

    def logits(self, given: RouterInput) -> Tensor:
        """Map task ids `[...]` to logits `[..., E]`, or `[..., splits, E]` if there is more than one split."""
        assert given.task_ids is not None
        logits = promote(F.embedding(given.task_ids, self.weight))
        return logits if self.num_splits == 1 else logits.unflatten(-1, (self.num_splits, -1))

    def by_expert(self) -> dict[str, tuple[Tensor, int]]:
        """The table, with a dimension for the splits."""
        return {"weight": (self.weight.data.unflatten(1, (self.num_splits, -1)), 2)}

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Uniform in ±0.001, as the authors'."""
        nn.init.uniform_(self.weight, -1e-3, 1e-3)


class DomainRouter(Router):
    """One linear router per domain, with learned logit noise in training (BECoTTA, arXiv 2402.08712).

    `logits = W_d x + ε · softplus(N_d x)`, d the task id of the row. Which domain a row belongs to is for the caller
    to say; the authors train a discriminator for it.
    """

    reads: ClassVar[str] = "input+task"

    def __init__(self, size: RouterSize) -> None:
        super().__init__()
        self.weight = parameter(size.num_tasks, size.num_experts, size.in_features)
        self.noise = parameter(size.num_tasks, size.num_experts, size.in_features)

    def logits(self, given: RouterInput) -> Tensor:
        """Map `[..., in]` to `[..., E]`."""
        logits = self._product(given, self.weight)
        if not self.training:
            return logits
        return logits + F.softplus(self._product(given, self.noise)) * torch.randn_like(logits)

    def by_expert(self) -> dict[str, tuple[Tensor, int]]:
        """The rows and the noise of every domain."""
        return {"weight": (self.weight.data, 1), "noise": (self.noise.data, 1)}

    def _product(self, given: RouterInput, weight: Tensor) -> Tensor:
        assert given.x is not None
        assert given.task_ids is not None
        # All domains at once, then each row's own: as cheap as gathering their rows, with one code path for any shape.
        every = linear(given.x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
        index = given.task_ids.reshape(*given.task_ids.shape, *[1] * (every.ndim - given.task_ids.ndim))
        return every.gather(-2, index.expand(*every.shape[:-2], 1, every.shape[-1])).squeeze(-2)

    def reset_parameters(self, init: str, init_range: float) -> None:
        """Rows as asked; the noise starts the same."""
        for weight in (self.weight, self.noise):
            ROUTER_INITS[init](weight, init_range)


class ActivationRouter(Router):
    """Each rank's own activation `A x` as its logit: no parameters (FlyLoRA, arXiv 2510.08396)."""

    reads: ClassVar[str] = "hidden"

    def __init__(self, size: RouterSize) -> None:
        super().__init__()

    def logits(self, given: RouterInput) -> Tensor:
        """Return the hidden `[..., R]` itself; every expert has rank one."""
        assert given.hidden is not None
        return promote(given.hidden)


class UnitActivationRouter(ActivationRouter):
    """`A x / ‖A x‖`, signed, over all ranks (MoRA for continual learning, arXiv 2506.21035)."""

    def logits(self, given: RouterInput) -> Tensor:
        """Map the hidden `[..., R]` to unit vectors."""
        return F.normalize(super().logits(given), dim=-1)


class ActivationNormRouter(ActivationRouter):
    """`‖A_e x‖` of each expert: the expert that reacts most is chosen (Autonomy-of-Experts, arXiv 2501.13074)."""

    def __init__(self, size: RouterSize) -> None:
        super().__init__(size)
        self.num_experts = size.num_experts

    def logits(self, given: RouterInput) -> Tensor:
        """Map the hidden `[..., R]` to one norm per expert, `[..., E]`."""
        assert given.expert_of_rank is not None
        squares = super().logits(given).square()
        experts = torch.arange(self.num_experts, device=squares.device)
        member = (given.expert_of_rank.unsqueeze(-1) == experts).to(squares.dtype)
        with full_precision(squares):
            norms = squares @ member
        # The root of zero has an infinite slope; an expert whose activation is all zero stays at zero without one.
        return torch.where(norms > 0, norms.clamp(min=torch.finfo(norms.dtype).tiny).sqrt(), 0.0)


class ExternalRouter(Router):
    """Scores handed to the forward pass are the logits: a classifier, an embedding model, or a person decides."""

    reads: ClassVar[str] = "scores"

    def __init__(self, size: RouterSize) -> None:
        super().__init__()

    def logits(self, given: RouterInput) -> Tensor:
        """Return the scores `[..., E]`."""
        assert given.scores is not None
        return promote(given.scores)
