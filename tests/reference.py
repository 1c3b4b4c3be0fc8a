"""Slow fp64 loops written from the papers' equations, token by token and expert by expert."""

from __future__ import annotations

import torch


def mixing_weights(probabilities, selection, *, threshold=None, top_k=None, top_p=None, minus=False, renormalize=True):
    """Weights `[E]` of one token."""
    num_experts = len(probabilities)
    order = sorted(range(num_experts), key=lambda e: -probabilities[e].item())
    if selection == "dense":
        kept = set(range(num_experts))
    elif selection == "top_k":
        kept = set(order[:top_k])
    elif selection == "top_p":
        kept, covered = set(), 0.0
        for expert in order:
            if covered < top_p * probabilities.sum().item():
                kept.add(expert)
            covered += probabilities[expert].item()
    else:
        kept = {e for e in range(num_experts) if probabilities[e] >= threshold}
    weights = torch.zeros_like(probabilities)
    for expert in kept:
        weights[expert] = probabilities[expert] - (threshold if minus else 0)
    total = weights.sum()
    return weights / total if renormalize and total > 0 else weights


def layer_output(layer, x, config, adapter="default"):
    """`W0 x + Σ_e w_e s_e B_e A_e x` of a molora layer, reading its parameters by their checkpoint names."""
    state = {name: value.detach().double() for name, value in layer.named_parameters()}
    ranks = layer.molora_ranks[adapter].ranks
    base = layer.get_base_layer()
    bank_a, bank_b = state[f"molora_A.{adapter}.weight"], state[f"molora_B.{adapter}.weight"]
    router = state.get(f"molora_router.{adapter}.weight")
    weight = base.weight.double() if base.weight.shape[0] == layer.out_features else base.weight.double().T
    bias = 0 if base.bias is None else base.bias.double()
    rows = []
    for token in x.double().reshape(-1, x.shape[-1]):
        if router is None:
            weights = torch.ones(1, dtype=torch.float64)
        else:
            logits = (router if router.ndim == 1 else router @ token) / config.temperature
            probabilities = torch.softmax(logits, 0) if config.gate == "softmax" else torch.sigmoid(logits)
            threshold = config.threshold or 1 / config.num_experts
            if config.selection == "adaptive_threshold":
                net_weight = state[f"molora_threshold.{adapter}.weight"][0]
                net_bias = state[f"molora_threshold.{adapter}.bias"][0]
                limit = config.max_threshold or 1 / config.num_experts
                threshold = limit * torch.sigmoid(net_weight @ token + net_bias)
            weights = mixing_weights(
                probabilities,
                config.selection,
                threshold=threshold,
                top_k=config.top_k or 2,
                top_p=config.top_p or 0.8,
                minus="minus" in (config.weights or ("minus" if config.selection == "adaptive_threshold" else "")),
                renormalize=config.renormalize,
            )
        row, start = weight @ token + bias, 0
        for expert, rank in enumerate(ranks):
            scale = config.lora_alpha / (rank**0.5 if config.use_rslora else rank)
            block = slice(start, start + rank)
            row = row + weights[expert] * scale * (bank_b[:, block] @ (bank_a[block] @ token))
            start += rank
        rows.append(row)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)
