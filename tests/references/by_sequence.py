"""One decision per sequence or task: by task id, cluster id, domain, or the mean of the prompt."""

from __future__ import annotations

import torch

from .common import (
    base_output,
    expert,
    expert_ranks,
    gelu,
    keep,
    layer_norm,
    linear_logits,
    mixture,
    needed,
    parameter,
    per_token,
    prompt_mean,
    setting,
    silu,
    softmax,
    softmax_of_selected,
    top_k,
)


def task_logits(state, hyper, inputs, b, temperature=1.0):
    """`(W emb[id] + bias) / T` of one sequence."""
    embedding = needed(state, "molora_router.embedding")[int(inputs["task_ids"][b])]
    return linear_logits(state, hyper, embedding, temperature)


def moelora(state, x, base, hyper, inputs):
    """MOELoRA (arXiv 2310.18339): `ω = softmax(W_T emb[task])`, `y = W0 x + Σ_i ω_i (α/r_total) B_i A_i x`, dense."""
    return mixture(state, x, base, hyper, lambda b, t: softmax(task_logits(state, hyper, inputs, b)))


def mocle(state, x, base, hyper, inputs):
    """MoCLE (arXiv 2312.12379): `y = W0 x + g E_top(x) + (1 - g) U(x)`, `g = max softmax((W emb[cluster] + b) / T)`.

    T = 0.05; the probability g is not renormalised; U is the universal expert, last in the bank. The authors' code
    multiplies E by g twice; the paper does not, nor is it done here.
    """

    def weigh(b, t):
        probabilities = softmax(task_logits(state, hyper, inputs, b, temperature=0.05))
        assert len(probabilities) == len(hyper.ranks) - 1
        routed = keep(probabilities, top_k(probabilities, 1))
        return torch.cat([routed, (1 - routed.sum()).reshape(1)])

    return mixture(state, x, base, hyper, weigh)


def becotta(state, x, base, hyper, inputs):
    """BECoTTA (arXiv 2402.08712), after a module with output z: `y = z + Σ_{i in top-K} G_i(z) s_i B_i gelu(A_i z)`.

    `G = softmax over the kept K of W_d z`, d the sequence's domain, K = 3, no noise at inference. Decided per token as
    in the paper (the code decides per image). A has a bias where the checkpoint holds one. The paper has no scale.
    """
    output = base_output(base, x)

    def change(b, t):
        z = output[b, t]
        router = needed(state, "molora_router.weight")[int(inputs["task_ids"][b])]
        logits = router @ z / setting(hyper, "temperature", 1.0)
        weights = softmax_of_selected(logits, top_k(logits, setting(hyper, "top_k", 3)))
        total = 0
        for e in range(len(hyper.ranks)):
            matrix_a, matrix_b, scale = expert(state, hyper, e)
            total = total + weights[e] * scale * (matrix_b @ gelu(matrix_a @ z + bias_of(state, hyper, e)))
        return total

    return per_token(x, base, change)


def bias_of(state, hyper, e):
    """Bias after A of one expert, 0 where there is none."""
    bias = parameter(state, "molora_A.bias")
    return 0 if bias is None else bias[expert_ranks(hyper, e)]


def task_shares(state, hyper, inputs, b):
    """`α = z / Σ_e z`, `z = sigmoid(table[task])`, per split: `[num_splits, E]`."""
    row = needed(state, "molora_router.weight")[int(inputs["task_ids"][b])]
    skills = torch.sigmoid(row.reshape(-1, len(hyper.ranks)))
    return torch.stack([split / split.sum() for split in skills])


def polytropon(state, x, base, hyper, inputs):
    """Polytropon: `y = W0 x + (Σ_s α_s s B_s)(Σ_s α_s A_s) x`, one α per task; factors are mixed, not deltas.

    The scale s is that of each expert and goes with its B: all experts have the same one.
    """
    experts = [expert(state, hyper, e) for e in range(len(hyper.ranks))]

    def change(b, t):
        shares = task_shares(state, hyper, inputs, b)
        assert len(shares) == 1
        mixed_a = sum(shares[0, e] * matrix_a for e, (matrix_a, _, _) in enumerate(experts))
        mixed_b = sum(shares[0, e] * scale * matrix_b for e, (_, matrix_b, scale) in enumerate(experts))
        return mixed_b @ (mixed_a @ x[b, t])

    return per_token(x, base, change)


def polytropon_mhr(state, x, base, hyper, inputs):
    """Multi-head routing: input and output are cut into q equal parts, each with its own α.

    `h = Σ_q (Σ_s α_qs A_s[:, part q]) x[part q]`, `Δy[part q] = (Σ_s α_qs s B_s[part q, :]) h`.
    """
    splits = hyper.num_splits
    experts = [expert(state, hyper, e) for e in range(len(hyper.ranks))]

    def change(b, t):
        shares = task_shares(state, hyper, inputs, b)
        assert len(shares) == splits
        width, hidden = x.shape[-1] // splits, 0
        for q in range(splits):
            part = slice(q * width, (q + 1) * width)
            mixed_a = sum(shares[q, e] * matrix_a[:, part] for e, (matrix_a, _, _) in enumerate(experts))
            hidden = hidden + mixed_a @ x[b, t, part]
        width, parts = experts[0][1].shape[0] // splits, []
        for q in range(splits):
            part = slice(q * width, (q + 1) * width)
            mixed_b = sum(shares[q, e] * scale * matrix_b[part] for e, (_, matrix_b, scale) in enumerate(experts))
            parts.append(mixed_b @ hidden)
        return torch.cat(parts)

    return per_token(x, base, change)


def smear_shares(state, hyper, mean):
    """`p_e = softmax(LN(mean) c_in · LN(W_e) c_w + b)_e`, LN without scale and shift, over the in-dimension."""
    rows = needed(state, "molora_router.weight")
    features = layer_norm(mean) * needed(state, "molora_router.input_scale")
    scale = needed(state, "molora_router.weight_scale")
    logits = torch.stack([features @ (layer_norm(row) * scale) for row in rows]) + needed(state, "molora_router.bias")
    return softmax(logits / setting(hyper, "temperature", 1.0))


def smear(state, x, base, hyper, inputs):
    """SMEAR (arXiv 2306.03745), after a module with output z: `y = z + (Σ p s B)(silu((Σ p A) z + Σ p b))`.

    p is decided once per sequence, on the mean of z over the prompt; the factors are averaged, so this is not a
    mixture of outputs. The paper has no scale; here each expert's goes with its B.
    """
    output = base_output(base, x)
    experts = [expert(state, hyper, e) for e in range(len(hyper.ranks))]

    def change(b, t):
        p = smear_shares(state, hyper, prompt_mean(output, inputs, b))
        mixed_a = sum(p[e] * matrix_a for e, (matrix_a, _, _) in enumerate(experts))
        mixed_b = sum(p[e] * scale * matrix_b for e, (_, matrix_b, scale) in enumerate(experts))
        mixed_bias = sum(p[e] * bias_of(state, hyper, e) for e in range(len(experts)))
        return mixed_b @ silu(mixed_a @ output[b, t] + mixed_bias)

    return per_token(x, base, change)
