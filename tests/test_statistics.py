"""Records find their masks, and statistics of them count real tokens and true experts."""

from __future__ import annotations

import pytest
import torch

from molora.routing.masks import TokenMasks
from molora.routing.record import RoutingRecord, RoutingRecorder
from molora.routing.route import Routing
from molora.routing.stacked import stack_records
from molora.routing.statistics import selection_counts, tally


def routed(probabilities, **fields):
    return Routing(probabilities, probabilities, probabilities > 0, probabilities, **fields)


def metrics(*records):
    return tally(stack_records(records)).metrics()


def test_padding_changes_no_statistic():
    probabilities = torch.randn(2, 6, 4).softmax(-1)
    padded = torch.nn.functional.pad(probabilities, (0, 0, 0, 3), value=0.25)
    mask = torch.nn.functional.pad(torch.ones(2, 6), (0, 3)).bool()

    def counted(p, m):
        routing = Routing(p.log(), p, p > 0.25, p)
        return metrics(RoutingRecord("a", "default", routing, TokenMasks(m)))

    assert counted(padded, mask) == pytest.approx(counted(probabilities, None))


def test_null_experts_count_as_no_expert():
    p = torch.tensor([[[0.5, 0.0, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]])
    record = RoutingRecord("a", "x", routed(p), TokenMasks(), null_experts=2)
    values = metrics(record)
    assert values["experts_per_token"] == pytest.approx(1)
    assert values["null_share"] == pytest.approx(0.5)
    assert values["load_max"] == pytest.approx(2 / 3)
    assert values["dead_experts"] == 0
    assert selection_counts(*stack_records([record])).tolist() == [[2, 1, 2, 1]]


def test_linears_of_different_width_are_tallied_side_by_side():
    even = [
        RoutingRecord(name, "x", routed(torch.full((1, 2, e), 1 / e)), TokenMasks())
        for name, e in (("a", 2), ("b", 4))
    ]
    counted = tally(stack_records(even)) + tally(stack_records(even[:1]))
    assert counted.load().tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4]
    assert counted.tokens.tolist() == [4, 2]
    values = counted.metrics()
    assert values["load_cv"] == values["dead_experts"] == 0
    assert values["load_max"] == pytest.approx(0.375)
    assert values["experts_per_token"] == 3


def test_a_decision_about_a_whole_sequence_counts_once_and_has_no_padding():
    record = RoutingRecord(
        "a", "x", routed(torch.full((2, 1, 4), 0.25), per_sequence=True), TokenMasks(torch.zeros(2, 9))
    )
    assert record.mask is None
    assert tally(stack_records([record])).tokens.tolist() == [2]


def test_columns_are_stacked_when_asked_for_and_ranks_of_shared_experts_left_out():
    recorder = RoutingRecorder()
    shared = torch.ones(1, 2, 3)
    p = torch.full((1, 2, 4), 0.25)
    recorder.append("a", "x", Routing(p, p, p > 0, shared), sizes=[4, 8, 16], null_experts=2)
    (stack,) = stack_records(recorder.records)
    assert (stack.sizes, stack.num_experts, stack.null_experts) == ((4, 8), 2, 2)
    assert "logits" not in vars(stack)
    assert stack.logits.shape == (1, 1, 2, 4)
    assert stack.weights.shape == (1, 1, 2, 3)
    assert "logits" in vars(stack)


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
    assert metrics["entropy"] == pytest.approx(0.5 * torch.tensor(2.0).log().item())
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
