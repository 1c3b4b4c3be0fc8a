"""Experts that were trained apart as plain LoRAs, with a router made afterwards or none at all."""

from __future__ import annotations

import math

import torch

from .common import (
    decision_at,
    delta,
    expert,
    keep,
    layer_norm,
    mixture,
    needed,
    parameter,
    per_token,
    renormalised,
    scores_at,
    setting,
    softmax,
    softmax_of_selected,
    top_k,
)
from .routed import softmax_top_k


def lora(state, x, base, hyper, inputs):
    """LoRA (arXiv 2106.09685): `y = W0 x + s B A x`."""
    return mixture(state, x, base, hyper, lambda b, t: [1.0] * len(hyper.ranks))


def static(state, x, base, hyper, inputs):
    """One learned mixture for all tokens: `y = W0 x + Σ_e p_e s_e B_e A_e x`, `p = softmax(g)`.

    No paper; the equation is the one the preset promises.
    """
    probabilities = softmax(needed(state, "molora_router.weight"))
    return mixture(state, x, base, hyper, lambda b, t: probabilities)


def x_lora(state, x, base, hyper, inputs):
    """X-LoRA: `w = softmax(mlp(h) / T)`, dense, `mlp(h) = W relu(W_in h + b_in) + b`.

    h is the base model's last hidden state at the prompt's last token (`decision [B, d]`): one decision per prompt,
    where the paper makes one for every token.
    """

    def weigh(b, t):
        hidden = decision_at(x, inputs, b, t)
        if parameter(state, "molora_router.weight_in") is not None:
            projected = needed(state, "molora_router.weight_in") @ hidden + needed(state, "molora_router.bias_in")
            hidden = torch.clamp(projected, min=0)
        logits = needed(state, "molora_router.weight") @ hidden + needed(state, "molora_router.bias")
        return softmax(logits / setting(hyper, "temperature", 1.0))

    return mixture(state, x, base, hyper, weigh)


def arrow(state, x, base, hyper, inputs):
    """Arrow: `sim_e = |x·p_e|` with p_e the top right singular vector of `B_e A_e`, top-3, softmax over the selected.

    x is not normalised. The prototypes are read from the checkpoint, not computed here.
    """
    prototypes = needed(state, "molora_router.weight")

    def weigh(b, t):
        similarity = torch.stack([(p @ decision_at(x, inputs, b, t)).abs() for p in prototypes])
        selected = top_k(similarity, setting(hyper, "top_k", 3))
        return softmax_of_selected(similarity / setting(hyper, "temperature", 1.0), selected)

    return mixture(state, x, base, hyper, weigh)


def phatgoose_logits(state, h):
    """`z_e = LN(x)·LN(v_e) / sqrt(n)`, LN without scale and shift."""
    gates = needed(state, "molora_router.weight")
    return torch.stack([layer_norm(h) @ layer_norm(v) / math.sqrt(len(h)) for v in gates])


def top_k_of_logits(logits, hyper, k):
    """Softmax over all experts, the k most probable, divided by their sum."""
    probabilities = softmax(logits / setting(hyper, "temperature", 1.0))
    return renormalised(keep(probabilities, top_k(probabilities, setting(hyper, "top_k", k))))


def phatgoose(state, x, base, hyper, inputs):
    """PHATGOOSE, inference: logits `LN(x)·LN(v_e) / sqrt(n)`, softmax over all, top-2, renormalised."""

    def weigh(b, t):
        return top_k_of_logits(phatgoose_logits(state, decision_at(x, inputs, b, t)), hyper, 2)

    return mixture(state, x, base, hyper, weigh)


def phatgoose_gate(state, x, base, hyper, inputs):
    """PHATGOOSE, training of one adapter's gate: `y = W0 x + sigmoid(v·x) s B A x`, one expert."""
    gate = needed(state, "molora_router.weight")[0]
    matrix_a, matrix_b, scale = expert(state, hyper, 0)

    def change(b, t):
        return torch.sigmoid(gate @ x[b, t]) * scale * (matrix_b @ (matrix_a @ x[b, t]))

    return per_token(x, base, change)


def glider(state, x, base, hyper, inputs):
    """Glider: PHATGOOSE's logits `+ s cos(query, expert)`, softmax, top-2, renormalised.

    The cosines are the given scores; s = 3 unless given (the authors use 100 for held-in data).
    """

    def weigh(b, t):
        local = phatgoose_logits(state, decision_at(x, inputs, b, t))
        return top_k_of_logits(local + setting(hyper, "score_weight", 3.0) * scores_at(inputs, b, t), hyper, 2)

    return mixture(state, x, base, hyper, weigh)


def self_moe(state, x, base, hyper, inputs):
    """Self-MoE / MiXSE: `α = top-k(softmax(W x))`, not renormalised; the router's weight is shared by the layers.

    k is not in what was read: 1 unless given.
    """
    return softmax_top_k(state, x, base, hyper, inputs, k=1, renormalise=False)


def lora_bank(state, x, base, hyper, inputs):
    """Rocket ("Leveraging Open Knowledge"): softmax of a linear router, top-2, renormalised.

    Each expert keeps its own scale; the authors' code leaves it out.
    """
    return softmax_top_k(state, x, base, hyper, inputs, k=2, renormalise=True)


def lorahub(state, x, base, hyper, inputs):
    """LoraHub: factors are mixed, `y = W0 x + (Σ_e w_e s_e B_e)(Σ_e w_e A_e) x`, w searched, any sign.

    The paper has one scale for all; here each expert's scale goes with its B. All ranks are equal.
    """
    weights = needed(state, "molora_router.weight")
    experts = [expert(state, hyper, e) for e in range(len(hyper.ranks))]
    mixed_a = sum(weights[e] * matrix_a for e, (matrix_a, _, _) in enumerate(experts))
    mixed_b = sum(weights[e] * scale * matrix_b for e, (_, matrix_b, scale) in enumerate(experts))
    return per_token(x, base, lambda b, t: mixed_b @ (mixed_a @ x[b, t]))


def psec(state, x, base, hyper, inputs):
    """PSEC with constant weights: `y = W0 x + Σ_e w_e s_e B_e A_e x`, w learned, without any constraint.

    The paper's weights come from a small network that reads the state; constants are its simpler form.
    """
    weights = needed(state, "molora_router.weight")
    return per_token(x, base, lambda b, t: delta(state, hyper, x[b, t], weights))


def selma(state, x, base, hyper, inputs):
    """SELMA: the mean of the experts, `y = W0 x + Σ_e (1/E) s_e B_e A_e x`."""
    count = len(hyper.ranks)
    return mixture(state, x, base, hyper, lambda b, t: [1 / count] * count)
