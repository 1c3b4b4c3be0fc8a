"""What the references share: reading a checkpoint's names, and the few rules that several papers use."""

from __future__ import annotations

import math

import torch


def setting(hyper, name, default):
    """Value of a hyper-parameter; None or absent is the documented default."""
    value = getattr(hyper, name, None)
    return default if value is None else value


def parameter(state, name, default=None):
    """Tensor `name`, or the only one under a prefix (a router that is kept beside one of several linears)."""
    if name in state:
        return state[name]
    found = [key for key in state if key.endswith(f".{name}")]
    if len(found) > 1:
        raise KeyError(f"{name} is ambiguous: {sorted(found)}")
    return state[found[0]] if found else default


def needed(state, name):
    """As `parameter`, for what the method cannot do without."""
    value = parameter(state, name)
    if value is None:
        raise KeyError(f"{name} is not among {sorted(state)}")
    return value


def bank(state, prefix=""):
    """`A [R, in]` and `B [out, R]` of all experts: the frozen ones come first."""
    rows = [state[key] for key in (f"{prefix}molora_frozen_A.weight", f"{prefix}molora_A.weight") if key in state]
    columns = [state[key] for key in (f"{prefix}molora_frozen_B.weight", f"{prefix}molora_B.weight") if key in state]
    return torch.cat(rows, dim=0), torch.cat(columns, dim=1)


def expert_ranks(hyper, e):
    """Where the ranks of expert `e` lie in the bank."""
    start = sum(hyper.ranks[:e])
    return slice(start, start + hyper.ranks[e])


def expert(state, hyper, e, prefix=""):
    """`A_e [r_e, in]`, `B_e [out, r_e]` and `s_e` of one expert with its own A and B."""
    matrix_a, matrix_b = bank(state, prefix)
    ranks = expert_ranks(hyper, e)
    return matrix_a[ranks], matrix_b[:, ranks], hyper.scales[e]


def rank_scales(hyper):
    """Scale of each rank, that of the expert it belongs to."""
    return [scale for rank, scale in zip(hyper.ranks, hyper.scales, strict=True) for _ in range(rank)]


def base_output(base, x):
    """Output of the frozen module; of a block that also returns router logits, the hidden states."""
    output = base(x)
    return output[0] if isinstance(output, tuple) else output


def decision_at(x, inputs, b, t):
    """What the deciding router read for this token: a shared router's input, else the module's own."""
    decision = inputs.get("decision")
    if decision is None:
        return x[b, t]
    return decision[b] if decision.dim() == 2 else decision[b, t]


def scores_at(inputs, b, t):
    """External scores `[E]` of this token."""
    scores = inputs["expert_scores"]
    return scores[b] if scores.dim() == 2 else scores[b, t]


def softmax(logits):
    """`p_i = exp(z_i) / Σ_j exp(z_j)`."""
    powers = torch.exp(logits - logits.max())
    return powers / powers.sum()


def linear_logits(state, hyper, h, temperature=1.0):
    """`z = (W h + b) / T`; most methods have no bias, and a default T of 1."""
    logits = needed(state, "molora_router.weight") @ h
    bias = parameter(state, "molora_router.bias")
    if bias is not None:
        logits = logits + bias
    return logits / setting(hyper, "temperature", temperature)


def layer_norm(values):
    """`(v - mean) / sqrt(var + 1e-5)` without scale and shift, biased variance."""
    centred = values - values.mean()
    return centred / torch.sqrt((centred**2).mean() + 1e-5)


def descending(values):
    """Indices from the largest value to the smallest; of equals the first comes first."""
    return sorted(range(len(values)), key=lambda i: -values[i].item())


def top_k(values, k):
    """Indices of the k largest values."""
    return descending(values)[:k]


def top_p(probabilities, p):
    """Indices in descending order until their sum reaches p, the crossing one included."""
    kept, covered = [], 0.0
    for i in descending(probabilities):
        kept.append(i)
        covered += probabilities[i].item()
        if covered >= p:
            break
    return kept


def keep(values, kept):
    """`values` where kept, else 0."""
    return torch.stack([value if i in kept else torch.zeros_like(value) for i, value in enumerate(values)])


def softmax_of_selected(logits, selected):
    """`w_i = exp(z_i) / Σ_{selected j} exp(z_j)`, 0 for the others."""
    shares = softmax(torch.stack([logits[i] for i in selected]))
    weights = [torch.zeros_like(logit) for logit in logits]
    for share, i in zip(shares, selected, strict=True):
        weights[i] = share
    return torch.stack(weights)


def renormalised(weights):
    """`w / Σ w`, and all zero where nothing was selected."""
    total = weights.sum()
    return weights / total if total.item() > 0 else torch.zeros_like(weights)


def delta(state, hyper, x, weights, prefix=""):
    """`Σ_e w_e s_e B_e A_e x` of one token."""
    total = 0
    for e in range(len(hyper.ranks)):
        matrix_a, matrix_b, scale = expert(state, hyper, e, prefix)
        total = total + weights[e] * scale * (matrix_b @ (matrix_a @ x))
    return total


def per_token(x, base, change):
    """`y[b, t] = base(x)[b, t] + change(b, t)`."""
    output = base_output(base, x)
    rows = [torch.stack([output[b, t] + change(b, t) for t in range(output.shape[1])]) for b in range(output.shape[0])]
    return torch.stack(rows)


def mixture(state, x, base, hyper, weigh):
    """`y = W0 x + Σ_e w_e s_e B_e A_e x` with `w = weigh(b, t)` per token."""
    return per_token(x, base, lambda b, t: delta(state, hyper, x[b, t], weigh(b, t)))


def prompt_mean(values, inputs, b):
    """Mean over the prompt's tokens of one sequence `[S, d]` (all tokens where no mask is given)."""
    mask = inputs.get("prompt_mask")
    tokens = [t for t in range(values.shape[1]) if mask is None or bool(mask[b, t])]
    return sum(values[b, t] for t in tokens) / len(tokens)


def gelu(values):
    """`x Φ(x)`, the exact form."""
    return values * 0.5 * (1 + torch.erf(values / math.sqrt(2)))


def silu(values):
    """`x sigmoid(x)`."""
    return values * torch.sigmoid(values)
