from __future__ import annotations

from typing import Any


def polytropon_mhr() -> dict[str, Any]:
    """As `polytropon`, with weights of their own for each of several parts of input and output.

    MHR, multi-head routing (arXiv 2211.03831): input and output are cut into q parts with weights a^q as in
    `polytropon`: `h = Σ_q (Σ_s a_s^q A_s^q) x^q`, `y^q = (W0 x)^q + (1/r) (Σ_s a_s^q B_s^q) h`. `num_splits=4` must
    divide both sizes.

    Defaults are those of PEFT's Poly: rank 8, 4 skills, Z from U(-0.001, 0.001), no alpha (the scale is 1/r). Needs
    `task_ids`; set `num_tasks` to the number of your tasks. Exactly mergeable for one task.
    Differs from the authors' code: beams and generation keep their task; dropout and other scales are possible. The
    optional prior on Z, and a learning rate of its own for Z, are not offered.
    """
    return {
        "num_experts": 4,
        "num_splits": 4,
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
