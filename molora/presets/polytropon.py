from __future__ import annotations

from typing import Any


def polytropon() -> dict[str, Any]:
    """The task decides which skills to use: a table of tasks and skills, whose factors are averaged.

    Polytropon (arXiv 2202.13914): `y = W0 x + (1/r) (Σ_s a_s B_s)(Σ_s a_s A_s) x`, `a = z / Σ z`,
    `z = sigmoid(Z[task])`, with logistic noise on Z in training (relaxed Bernoulli). A and B are averaged apart, so
    this is no mixture of outputs.

    Defaults are those of PEFT's Poly: rank 8, 4 skills, Z from U(-0.001, 0.001), no alpha (the scale is 1/r). Needs
    `task_ids`; set `num_tasks` to the number of your tasks. Exactly mergeable for one task.
    Differs from the authors' code: beams and generation keep their task; dropout and other scales are possible. The
    optional prior on Z, and a learning rate of its own for Z, are not offered.
    """
    return {
        "num_experts": 4,
        "r": 8,
        "lora_alpha": 1,
        "expert_layout": "factors",
        "router": "table",
        "num_tasks": 16,
        "gate": "relaxed_bernoulli",
        "selection": "dense",
        "weights": "probability",
        "renormalize": True,
    }
