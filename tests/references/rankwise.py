"""Single ranks as experts: `y = W0 x + B (s ⊙ g(x) ⊙ (A x))`, a_i a row of A and b_i a column of B."""

from __future__ import annotations

import torch

from .common import (
    bank,
    decision_at,
    delta,
    keep,
    linear_logits,
    mixture,
    needed,
    parameter,
    per_token,
    rank_scales,
    scores_at,
    setting,
    softmax,
    top_k,
)


def rank_sum(state, hyper, x, gate):
    """`Σ_i g_i s_i b_i (a_i·x)` of one token."""
    matrix_a, matrix_b = bank(state)
    scales, total = rank_scales(hyper), 0
    for i in range(matrix_a.shape[0]):
        total = total + gate[i] * scales[i] * (matrix_a[i] @ x) * matrix_b[:, i]
    return total


def selection_bias(state, like):
    """Loss-free bias per expert, 0 where the method is used without."""
    bias = parameter(state, "molora_bias.weight")
    return torch.zeros_like(like) if bias is None else bias.to(like)


def smora(state, x, base, hyper, inputs):
    """SMoRA: `u = sigmoid(W x) + β`, top-k of u, `g_i = u_i / Σ_selected u`, scale α.

    The paper writes (α/k) k u_i / Σ u; the factors k cancel, and `hyper.scales` holds α/r with r = 1. The bias is
    inside the weight, unlike DeepSeek's rule.
    """

    def weigh(b, t):
        gate = torch.sigmoid(linear_logits(state, hyper, decision_at(x, inputs, b, t)))
        biased = gate + selection_bias(state, gate)
        kept = keep(biased, top_k(biased, setting(hyper, "top_k", 8)))
        return kept / kept.sum()

    return mixture(state, x, base, hyper, weigh)


def flylora(state, x, base, hyper, inputs):
    """FlyLoRA: `y = W0 x + s Σ_{i in top-k of |A x + d|} b_i a_i x`: weight 1, no router of its own.

    The paper's rule by absolute value; the authors' PEFT fork selects by the signed value.
    """
    matrix_a, _ = bank(state)

    def change(b, t):
        activation = matrix_a @ x[b, t]
        magnitude = (activation + selection_bias(state, activation)).abs()
        gate = keep(torch.ones_like(activation), top_k(magnitude, setting(hyper, "top_k", 8)))
        return rank_sum(state, hyper, x[b, t], gate)

    return per_token(x, base, change)


def mor1e_gate(state, x, hyper, inputs, b, t):
    """`g = c_tok σ(100 θ) softmax(W x) + c_task (1 - σ(100 θ)) c`, c the instance's scores.

    `(c_tok, c_task)` are 32 and 4 unless given.
    """
    token, task = setting(hyper, "blend_coefficients", (32.0, 4.0))
    share = torch.sigmoid(100 * needed(state, "molora_blend.token")[0])
    probabilities = softmax(linear_logits(state, hyper, decision_at(x, inputs, b, t)))
    return token * share * probabilities + task * (1 - share) * scores_at(inputs, b, t)


def mor1e_output_gate(state):
    """`σ(100 φ)`, by which the whole change is multiplied."""
    return torch.sigmoid(100 * needed(state, "molora_blend.output")[0])


def mor1e(state, x, base, hyper, inputs):
    """Intuition-MoR1E (arXiv 2404.08985), rank-1 experts: `y = W0 x + σ(100 φ) B (g ⊙ A x)`.

    The paper applies no LoRA scale; a preset that agrees gives scales of 1.
    """

    def change(b, t):
        gate = mor1e_gate(state, x, hyper, inputs, b, t)
        return mor1e_output_gate(state) * delta(state, hyper, x[b, t], gate)

    return per_token(x, base, change)


def mor1e_pairs(state, x, base, hyper, inputs):
    """T-REX, every pair (a_i, b_j) an expert: `G = reshape(g, [r1, r2])`, `z_j = Σ_i (A x)_i G_ij`, `B z`.

    `y = W0 x + σ(100 φ) B z`; `hyper.r` is (r1, r2), expert i r2 + j has scale `hyper.scales[i r2 + j]`.
    """
    r1, r2 = hyper.r
    matrix_a, matrix_b = state["molora_A.weight"], state["molora_B.weight"]

    def change(b, t):
        gate = mor1e_gate(state, x, hyper, inputs, b, t)
        total = 0
        for i in range(r1):
            for j in range(r2):
                pair = i * r2 + j
                total = total + gate[pair] * hyper.scales[pair] * (matrix_a[i] @ x[b, t]) * matrix_b[:, j]
        return mor1e_output_gate(state) * total

    return per_token(x, base, change)


def mora_cl(state, x, base, hyper, inputs):
    """MoRA for continual learning (v3: MoRAM), all ranks of all tasks together.

    `s = A x / ||A x||`, `w = softmax(s / T)` over all ranks, the k largest w kept, at inference also `s_i >= δ`
    (`min_logit`, compared with s before the temperature); not renormalised (the paper does not say). k, T and δ are
    not in what was read: None means all ranks, 1 and no limit.
    """
    matrix_a, _ = bank(state)
    limit = setting(hyper, "min_logit", -float("inf"))

    def change(b, t):
        activation = matrix_a @ x[b, t]
        signal = activation / torch.sqrt((activation**2).sum()).clamp(min=1e-12)
        weights = softmax(signal / setting(hyper, "temperature", 1.0))
        kept = [i for i in top_k(weights, setting(hyper, "top_k", len(weights))) if signal[i] >= limit]
        return rank_sum(state, hyper, x[b, t], keep(weights, kept))

    return per_token(x, base, change)


def shard_rows(pool, index):
    """Row i is the concatenation over j of `pool[index[i, j]]`."""
    rows = []
    for choice in index.long().tolist():
        rows.append(torch.cat([pool[shard] for shard in choice]))
    return torch.stack(rows)


def mos(state, x, base, hyper, inputs):
    """MoS, Mixture of Shards: `y = W0 x + (α/r) B A x`, A and B put together from pools by fixed random indices.

    Row i of A is `concat_j pool_A[index_A[i, j]]`, column i of B is `concat_j pool_B[index_B[i, j]]`. No routing.
    """
    matrix_a = shard_rows(needed(state, "molora_pool.weight_A"), state["molora_A.index"])
    matrix_b = shard_rows(needed(state, "molora_pool.weight_B"), state["molora_B.index"]).T
    return per_token(x, base, lambda b, t: hyper.scales[0] * (matrix_b @ (matrix_a @ x[b, t])))
