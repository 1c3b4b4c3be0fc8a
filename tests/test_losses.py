"""Load balancing means what its docstring says."""

from __future__ import annotations

import pytest
import torch

from molora.losses import load_balancing
from molora.routing.record import RoutingRecord, TokenMasks, stack_records
from molora.routing.route import Routing
from molora.routing.selection import top_p
from molora.routing.statistics import tally


def one_hot(experts, num_experts=4):
    return torch.nn.functional.one_hot(torch.tensor(experts), num_experts).bool()


def slow(probabilities, selected, mask, scope):
    """Loops over linears, sequences, tokens and experts."""
    layers, batch, length, num_experts = probabilities.shape
    groups = [[(b, s) for s in range(length)] for b in range(batch)]
    if scope == "batch":
        groups = [[token for group in groups for token in group]]
    values = []
    for layer in range(layers):
        for group in groups:
            tokens = [(b, s) for b, s in group if mask[b, s]]
            if not tokens:
                continue
            total = sum(selected[layer, b, s].sum() for b, s in tokens)
            value = 0.0
            for e in range(num_experts):
                f = sum(selected[layer, b, s, e] for b, s in tokens) / total
                p = sum(probabilities[layer, b, s, e] / probabilities[layer, b, s].sum() for b, s in tokens)
                value = value + f * p / len(tokens)
            values.append(num_experts * value)
    return torch.stack(values).mean()


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_value_and_gradient_equal_the_slow_loop(scope, gate):
    logits = torch.randn(2, 3, 5, 4, requires_grad=True)
    probabilities = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    selected = probabilities.detach() > 0.2
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    got = load_balancing(probabilities, selected, mask, scope)
    expected = slow(probabilities, selected, mask, scope)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, logits, retain_graph=True), torch.autograd.grad(expected, logits), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_one_at_balance_and_num_experts_at_collapse(scope):
    even = torch.full((1, 8, 4), 0.25)
    assert load_balancing(even, one_hot([[0, 1, 2, 3] * 2]), scope=scope) == pytest.approx(1)
    assert load_balancing(even, torch.ones(1, 8, 4).bool(), scope=scope) == pytest.approx(1)
    assert load_balancing(one_hot([[2] * 8]).float(), one_hot([[2] * 8]), scope=scope) == pytest.approx(4)


def test_linears_that_collapse_onto_different_experts_are_not_called_balanced():
    collapsed = torch.stack([one_hot([[expert] * 8]) for expert in range(4)])
    assert load_balancing(collapsed.float(), collapsed) == pytest.approx(4)


def test_padding_changes_neither_loss_nor_statistics():
    probabilities = torch.randn(2, 6, 4).softmax(-1)
    selected = probabilities > 0.25
    mask = torch.ones(2, 6).bool()
    padded = torch.nn.functional.pad(probabilities, (0, 0, 0, 3), value=0.25)
    padded_mask = torch.nn.functional.pad(mask, (0, 3))
    assert load_balancing(padded, padded > 0.25, padded_mask) == pytest.approx(load_balancing(probabilities, selected))

    def counted(p, m):
        routing = Routing(p.log(), p, p > 0.25, p)
        return tally(stack_records([RoutingRecord("a", "default", routing, TokenMasks(m))])).metrics()

    assert counted(padded, padded_mask) == pytest.approx(counted(probabilities, None))


def test_a_batch_of_nothing_but_padding_is_zero_not_nan():
    assert load_balancing(torch.full((1, 2, 4), 0.25), torch.ones(1, 2, 4).bool(), torch.zeros(1, 2).bool()) == 0


def test_a_gate_that_underflows_stays_finite_and_keeps_one_expert():
    probabilities = torch.full((1, 3, 4), -200.0).sigmoid()
    selected = top_p(probabilities, 0.8)
    assert selected.any(dim=-1).all()
    assert torch.isfinite(load_balancing(probabilities, selected))


def test_statistics_of_passes_through_different_linears_add_up():
    """Layers may be dropped at random, or chosen by the data."""
    p = torch.full((1, 2, 4), 0.25)

    def passed(*layers):
        routing = Routing(p, p, p > 0, p)
        return tally(stack_records([RoutingRecord(name, "default", routing, TokenMasks()) for name in layers]))

    total = passed("a", "b") + passed("b", "c")
    assert dict(zip(total.layers, total.tokens.tolist(), strict=True)) == {"a": 2, "b": 4, "c": 2}
    assert total.metrics()["experts_per_token"] == 4


def test_statistics_of_a_known_routing():
    probabilities = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    routing = Routing(probabilities, probabilities, probabilities > 0, probabilities, torch.full((1, 2, 1), 0.2))
    metrics = tally(stack_records([RoutingRecord("a", "default", routing, TokenMasks())])).metrics()
    assert metrics["experts_per_token"] == pytest.approx(1.5)
    assert metrics["load_max"] == pytest.approx(2 / 3)
    assert metrics["dead_experts"] == 2
    assert metrics["router_entropy"] == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert metrics["threshold_mean"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q", "input"),
        ("decoder.block.0.layer.0.SelfAttention.q", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.k", "input"),
        ("model.decoder.layers.0.encoder_attn.v_proj", "input"),
        ("model.decoder.layers.0.encoder_attn.out_proj", "decoder"),
    ],
)
def test_an_encoder_decoders_linears_find_their_own_mask(layer, side):
    masks = TokenMasks(torch.ones(2, 5), torch.zeros(2, 5), encoder_decoder=True)
    assert masks.of_layer(layer, torch.Size((2, 5))).all().item() == (side == "input")


def test_with_a_cache_the_end_of_the_mask_counts():
    masks = TokenMasks(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert masks.of_layer("a", torch.Size((2, 1))).tolist() == [[True], [True]]
    assert masks.of_layer("a", torch.Size((2, 3))).tolist() == [[False, True, True], [True, True, True]]
