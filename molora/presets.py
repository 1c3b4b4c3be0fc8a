"""Presets: published methods as a few config fields. Each function's docstring says what the method is.

A preset only returns field values; anything else in `MoLoraConfig` keeps its default, and any field may be overridden
in `MoLoraConfig.from_preset(name, **overrides)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from molora.errors import ConfigError, Problem, one_of
from molora.routing import SELECTION_OF_FIELD


def adamole() -> dict[str, Any]:
    """Adaptive thresholds: each token keeps the experts whose probability exceeds its own learned threshold.

    AdaMoLE (arXiv 2405.00361), per linear, with `p = softmax(W_g x)` and `τ = τ_max · sigmoid(w·x + b)`:
    `y = W0 x + Σ_e w_e (α/r) B_e A_e x`, `w_e = (p_e − τ)·1[p_e ≥ τ] / Σ_j (p_j − τ)·1[p_j ≥ τ]`.

    Paper defaults: 8 experts of rank 4, alpha 16, `τ_max = 1/E`, q/k/v/o projections, dropout 0.05.
    Differs from the authors' code: the softmax is in fp32; one dropout mask serves all experts; the balancing loss is
    Switch's on probabilities averaged over linears (theirs uses `p − τ`, summed over linears, which mostly pushes the
    threshold up). Dropout is left at 0; set `lora_dropout=0.05` and the paper's `target_modules` to follow it fully.
    """
    return {
        "num_experts": 8,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "adaptive_threshold",
        "weights": "probability_minus_threshold",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }


def mole() -> dict[str, Any]:
    """Top-k routing: each token mixes its two most probable experts, weights summing to one.

    MoLE, the baseline of AdaMoLE (arXiv 2405.00361), with `p = softmax(W_g x)`:
    `y = W0 x + Σ_{e∈top-k} w_e (α/r) B_e A_e x`, `w_e = p_e / Σ_{j∈top-k} p_j`.

    Defaults as `adamole`, with `top_k=2`. The paper's other baseline, a constant threshold, is
    `selection="threshold"`.
    """
    return {
        "num_experts": 8,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "gate": "softmax",
        "selection": "top_k",
        "top_k": 2,
        "weights": "probability",
        "renormalize": True,
        "routing_losses": {"load_balancing": 1e-3},
    }


def molora() -> dict[str, Any]:
    """Dense soft routing: every expert counts, by its probability.

    MoLORA (arXiv 2309.05444): `y = W0 x + Σ_e p_e (α/r) B_e A_e x`, `p = softmax(W_g x)` in fp32, router drawn from
    N(0, 0.02), no balancing loss. Authors' scale is 16/r. Differs: their A is drawn from N(0, 0.02), here
    kaiming-uniform as in PEFT's LoRA.
    """
    return {
        "num_experts": 10,
        "r": 4,
        "lora_alpha": 16,
        "router": "linear",
        "router_init": "normal",
        "router_init_range": 0.02,
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }


def static() -> dict[str, Any]:
    """A learned gate that ignores the input: a fixed mixture, exactly mergeable into the base model.

    `y = W0 x + Σ_e p_e (α/r) B_e A_e x` with `p = softmax(g)` and one learned vector `g` per linear, starting at equal
    shares. Because the gate is constant, `merge_and_unload()` is exact.
    """
    return {
        "num_experts": 4,
        "r": 4,
        "lora_alpha": 16,
        "router": "static",
        "gate": "softmax",
        "selection": "dense",
        "weights": "probability",
        "renormalize": False,
    }


def lora() -> dict[str, Any]:
    """One expert and no router: numerically PEFT's LoRA, as the baseline to compare with.

    `y = W0 x + (α/r) B A x` (arXiv 2106.09685). Rank and alpha are PEFT's defaults, 8 and 8.
    """
    return {"num_experts": 1, "r": 8, "lora_alpha": 8, "router": "none", "selection": "dense", "renormalize": False}


PRESETS: dict[str, Callable[[], dict[str, Any]]] = {
    preset.__name__: preset for preset in (adamole, mole, molora, static, lora)
}


def available_presets() -> list[str]:
    """Names accepted by `MoLoraConfig.from_preset`, sorted."""
    return sorted(PRESETS)


def preset_fields(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of a preset with `overrides` on top.

    Overriding `selection` drops the preset's settings that only its own selection reads (such as `top_k`, or weights
    that need a threshold), since they would no longer mean anything.

    Raises:
        ConfigError: If there is no such preset.
    """
    if name not in PRESETS:
        raise ConfigError([Problem("preset", one_of(name, available_presets()))], "unknown preset")
    fields = PRESETS[name]()
    selection = overrides.get("selection", fields["selection"])
    if selection != fields["selection"]:
        fields.pop("weights", None)
        fields = {key: value for key, value in fields.items() if SELECTION_OF_FIELD.get(key, selection) == selection}
    return {**fields, **overrides}
