"""MixLoRA: each expert is a whole feed-forward block with LoRAs on its three linears."""

from __future__ import annotations

import torch

from .common import decision_at, expert, keep, linear_logits, renormalised, setting, softmax, top_k, top_p


def adapted(state, hyper, e, name, linear, values):
    """`W v + s B_e A_e v` of one linear of expert e."""
    matrix_a, matrix_b, scale = expert(state, hyper, e, prefix=f"{name}.")
    return linear(values) + scale * (matrix_b @ (matrix_a @ values))


def ffn_expert(state, hyper, base, e, h):
    """`e_k = W2 (act(g_k) u_k) + s B2_k A2_k (act(g_k) u_k)`.

    `g_k = W1 h + s B1_k A1_k h` and `u_k = W3 h + s B3_k A3_k h`.
    """
    gate = adapted(state, hyper, e, "gate_proj", base.gate, h)
    up = adapted(state, hyper, e, "up_proj", base.up, h)
    return adapted(state, hyper, e, "down_proj", base.down, base.act(gate) * up)


def mixed_ffn(state, x, base, hyper, inputs, weigh):
    """`out = Σ_k w_k e_k(h)`: the base path lies inside the mixture."""
    sequences = []
    for b in range(x.shape[0]):
        tokens = []
        for t in range(x.shape[1]):
            weights = weigh(softmax(linear_logits(state, hyper, decision_at(x, inputs, b, t))))
            experts = range(len(hyper.ranks))
            tokens.append(sum(weights[e] * ffn_expert(state, hyper, base, e, x[b, t]) for e in experts))
        sequences.append(torch.stack(tokens))
    return torch.stack(sequences)


def mixlora(state, x, base, hyper, inputs):
    """MixLoRA (arXiv 2404.15159): one router per block reads h, softmax, top-2 renormalised, `out = Σ_k w_k e_k`."""

    def weigh(probabilities):
        return renormalised(keep(probabilities, top_k(probabilities, setting(hyper, "top_k", 2))))

    return mixed_ffn(state, x, base, hyper, inputs, weigh)


def mixlora_dynamic(state, x, base, hyper, inputs):
    """MixLoRA with top-p routing (p = 0.8): the probabilities of the selected experts as they are.

    Their sum is below 1, so the base output is scaled down with them; that is the authors' rule.
    """

    def weigh(probabilities):
        return keep(probabilities, top_p(probabilities, setting(hyper, "top_p", 0.8)))

    return mixed_ffn(state, x, base, hyper, inputs, weigh)
