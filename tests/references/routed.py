"""Whole LoRAs as experts, routed per token: `y = W0 x + Σ_e w_e s_e B_e A_e x`, `p = softmax(W x)`."""

from __future__ import annotations

import torch

from .common import (
    bank,
    decision_at,
    expert_ranks,
    keep,
    linear_logits,
    mixture,
    needed,
    per_token,
    renormalised,
    setting,
    softmax,
    top_k,
    top_p,
)


def probabilities_at(state, x, hyper, inputs, b, t):
    """`p = softmax(W h)` of one token, h being what the router reads."""
    return softmax(linear_logits(state, hyper, decision_at(x, inputs, b, t)))


def dense_softmax(state, x, base, hyper, inputs):
    """`w = p`: every expert, nothing selected."""
    return mixture(state, x, base, hyper, lambda b, t: probabilities_at(state, x, hyper, inputs, b, t))


def softmax_top_k(state, x, base, hyper, inputs, *, k, renormalise):
    """`w_e = p_e` for the k most probable experts, 0 else; divided by their sum where `renormalise`."""

    def weigh(b, t):
        probabilities = probabilities_at(state, x, hyper, inputs, b, t)
        weights = keep(probabilities, top_k(probabilities, setting(hyper, "top_k", k)))
        return renormalised(weights) if renormalise else weights

    return mixture(state, x, base, hyper, weigh)


def recommended(state, x, base, hyper, inputs):
    """The library's own: `p = softmax(W (h - μ) / σ + b)`, top-2 of `p + β`, weights `p_i / Σ_selected p`.

    Experts without a row in W, the last of the bank, are shared: their weight is one.
    """
    mean, deviation = needed(state, "molora_router.input_mean"), needed(state, "molora_router.input_std")
    balance = needed(state, "molora_bias.weight")

    def weigh(b, t):
        normalised = (decision_at(x, inputs, b, t) - mean) / deviation
        probabilities = softmax(linear_logits(state, hyper, normalised))
        routed = renormalised(keep(probabilities, top_k(probabilities + balance, setting(hyper, "top_k", 2))))
        return torch.cat([routed, torch.ones(len(hyper.ranks) - len(routed), dtype=routed.dtype)])

    return mixture(state, x, base, hyper, weigh)


def adamole(state, x, base, hyper, inputs):
    """AdaMoLE (arXiv 2405.00361, eq. 5-7).

    `p = softmax(W_g x)`, `τ = τ_max sigmoid(w_τ·x + b_τ)`, `m_i = 1[p_i - τ >= 0]`,
    `w_i = (p_i - τ) m_i / Σ_j (p_j - τ) m_j`, all zero if the sum is. τ_max is 1/E unless given.
    """
    tau_max = setting(hyper, "max_threshold", 1 / len(hyper.ranks))
    weight, bias = needed(state, "molora_threshold.weight"), needed(state, "molora_threshold.bias")

    def weigh(b, t):
        probabilities = probabilities_at(state, x, hyper, inputs, b, t)
        threshold = tau_max * torch.sigmoid(weight[0] @ decision_at(x, inputs, b, t) + bias[0])
        margin = probabilities - threshold
        return renormalised(keep(margin, [i for i in range(len(margin)) if margin[i] >= 0]))

    return mixture(state, x, base, hyper, weigh)


def mole(state, x, base, hyper, inputs):
    """MoLE, baseline of AdaMoLE: top-2 of the softmax, weights `p_i / Σ_selected p`."""
    return softmax_top_k(state, x, base, hyper, inputs, k=2, renormalise=True)


def loramoe(state, x, base, hyper, inputs):
    """LoRAMoE (arXiv 2312.09979): `y = W0 x + Σ_i ω_i(x) (α/r) B_i A_i x`, `ω = softmax(W x)`, dense."""
    return dense_softmax(state, x, base, hyper, inputs)


def mola(state, x, base, hyper, inputs):
    """MoLA (arXiv 2402.08562): softmax, top-2 renormalised; the number of experts differs by layer."""
    return softmax_top_k(state, x, base, hyper, inputs, k=2, renormalise=True)


def sira(state, x, base, hyper, inputs):
    """SiRA (arXiv 2311.09179) at inference, without capacity and expert dropout: softmax, top-k, renormalised.

    That the weights are renormalised is not stated in what was read of the paper; the project decided so. k = 4 is
    from memory.
    """
    return softmax_top_k(state, x, base, hyper, inputs, k=4, renormalise=True)


def molora(state, x, base, hyper, inputs):
    """MoLORA (arXiv 2309.05444), soft merging: `y += (α/r) Σ_e p_e (x A_e) B_e`, `p = softmax(W x)`, dense."""
    return dense_softmax(state, x, base, hyper, inputs)


def hydralora(state, x, base, hyper, inputs):
    """HydraLoRA (arXiv 2404.19245): one A, many B: `y = W0 x + Σ_i ω_i(x) (α/r) B_i A x`, `ω = softmax(W x)`.

    The router reads x as in the code; the paper's "intermediate token representation" may mean A x.
    """
    matrix_a, matrix_b = bank(state)

    def change(b, t):
        probabilities, hidden, total = probabilities_at(state, x, hyper, inputs, b, t), matrix_a @ x[b, t], 0
        for e in range(len(hyper.ranks)):
            head = matrix_b[:, expert_ranks(hyper, e)]
            total = total + probabilities[e] * hyper.scales[e] * (head @ hidden)
        return total

    return per_token(x, base, change)


def adamoe(state, x, base, hyper, inputs):
    """AdaMoE (arXiv 2406.13233): softmax over n true and m null experts, top-k over all of them.

    `w_i = p_i / Σ_{selected true} p_j`; null experts give nothing; no true expert selected gives the base output.
    """
    num_true = len(hyper.ranks)

    def weigh(b, t):
        probabilities = probabilities_at(state, x, hyper, inputs, b, t)
        assert len(probabilities) == num_true + setting(hyper, "null_experts", 0)
        selected = top_k(probabilities, setting(hyper, "top_k", 4))
        return renormalised(keep(probabilities, selected)[:num_true])

    return mixture(state, x, base, hyper, weigh)


def perft(state, x, base, hyper, inputs):
    """PERFT-R (arXiv 2411.08212): beside a whole block, `y = block(x) + Σ_{j in top-k} p_j s_j B_j A_j x`.

    The adapter router's own probabilities over M, not renormalised (OLMoE's `norm_topk_prob` is false).
    """
    return softmax_top_k(state, x, base, hyper, inputs, k=2, renormalise=False)


def pmoe(state, x, base, hyper, inputs):
    """PMoE (arXiv 2407.21571): one router decides for all deep layers, `p = softmax(W h)` with h its own input.

    The gate is not stated in what was read: the project decided top-2 renormalised. `decision [B, S, in']` is h.
    """
    if inputs.get("decision") is None:
        raise KeyError("decision: what the router shared by the deep layers read")
    return softmax_top_k(state, x, base, hyper, inputs, k=2, renormalise=True)


def aoe(state, x, base, hyper, inputs):
    """Autonomy-of-Experts (OpenReview; LoRA form): `p = softmax(||A_i x||_2)`, top-k, `w = p`, not renormalised."""
    matrix_a, _ = bank(state)

    def weigh(b, t):
        norms = [
            torch.sqrt(((matrix_a[expert_ranks(hyper, e)] @ x[b, t]) ** 2).sum()) for e in range(len(hyper.ranks))
        ]
        probabilities = softmax(torch.stack(norms) / setting(hyper, "temperature", 1.0))
        return keep(probabilities, top_k(probabilities, setting(hyper, "top_k", 2)))

    return mixture(state, x, base, hyper, weigh)


def hmoe(state, x, base, hyper, inputs):
    """HMoE (LoRA form): experts of unequal rank, softmax, top-p with p = 0.6, renormalised over the selected."""

    def weigh(b, t):
        probabilities = probabilities_at(state, x, hyper, inputs, b, t)
        return renormalised(keep(probabilities, top_p(probabilities, setting(hyper, "top_p", 0.6))))

    return mixture(state, x, base, hyper, weigh)
