"""Statistics of a training: what is warned of, what a log carries, what a checkpoint keeps for reports."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from test_loss_wiring import TOP_2, adapted, trainer_for

from molora.routing.diagnosis import routing_problems
from molora.routing.statistics import RoutingTally
from molora.trainers.metrics import MAX_ENTRIES, RoutingMetrics, add_to_history


def tally_of(*selected, tokens=1000.0):
    """Linears by the selections of their experts."""
    counts = torch.tensor(selected, dtype=torch.float32)
    linears = len(counts)
    return RoutingTally(
        tuple(f"layers.{index}" for index in range(linears)),
        torch.full((linears,), tokens),
        counts,
        torch.zeros(linears),
        torch.full((linears,), float(counts.shape[1])),
        torch.full((linears,), 100.0),
        torch.zeros(linears),
    )


@pytest.mark.parametrize(
    ("tally", "kinds"),
    [
        (tally_of([250, 250, 250, 250]), []),
        (tally_of([900, 40, 30, 30]), []),
        (tally_of([500, 500, 0, 0]), ["dead"]),
        (tally_of([500, 480, 10, 10], [250, 250, 250, 250]), []),
        (tally_of([990, 4, 3, 3], [250, 250, 250, 250]), ["dead", "collapsed"]),
        (tally_of([1000, 980, 10, 10]), ["dead", "collapsed"]),  # two experts a token, and always the same two
        (tally_of([1000, 1000, 1000, 1000]), []),  # dense
        (tally_of([99, 0, 0, 1], tokens=100.0), []),  # too few tokens to tell
        (tally_of([1000]), []),
    ],
    ids=[
        "even",
        "uneven",
        "half dead",
        "one linear with two dead",
        "collapsed",
        "the same two",
        "dense",
        "few",
        "one",
    ],
)
def test_dead_experts_and_collapsed_routers_are_found(tally, kinds):
    assert [kind for kind, _ in routing_problems(tally)] == kinds


def test_a_warning_names_a_linear_and_a_remedy():
    [(_, dead), (_, collapsed)] = routing_problems(tally_of([250, 250, 250, 250], [1000, 0, 0, 0]))
    assert "3 of 8 experts" in dead
    assert "layers.1" in dead
    assert "layers.1" in collapsed
    assert all("balance_bias_rate" in sentence for sentence in (dead, collapsed))


def test_a_training_warns_once_of_a_router_that_collapses(tmp_path, caplog):
    model = adapted(TOP_2, {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_router" in name:  # whatever the token, the first two win
                parameter.zero_()
    long_rows = {"max_steps": 4, "learning_rate": 0.0, "per_device_train_batch_size": 8, "logging_steps": 2}
    trainer = trainer_for(tmp_path, model, **long_rows)
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {name: row[name] * 8 for name in ("input_ids", "labels")}
    )
    with caplog.at_level(logging.WARNING, logger="molora.trainers"):
        trainer.train()
    sentences = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len([s for s in sentences if "plain LoRA" in s]) == 1, sentences
    assert sentences[0].startswith("step 2:")


def test_metrics_are_means_over_micro_batches_and_start_anew():
    metrics = RoutingMetrics()
    metrics.add("molora/", tally_of([600, 400]), {"router_z": torch.tensor(1.0)})
    metrics.add("molora/", tally_of([400, 600]), {"router_z": torch.tensor(2.0)})
    logged, tallies = metrics.take()
    assert logged["molora/router_z"] == 1.5
    assert logged["molora/load_max"] == 0.5
    assert tallies["molora/"].selected.tolist() == [[1000, 1000]]
    assert metrics.take() == ({}, {})


def test_a_checkpoint_keeps_the_history_of_every_linear(tmp_path):
    trainer = trainer_for(tmp_path, adapted(TOP_2, {}), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    history = state["stateful_callbacks"]["molora"]["history"]["molora/"]
    assert len(history["layers"]) == 4
    assert [entry["step"] for entry in history["entries"]] == [1, 2, 3, 4]
    for entry in history["entries"]:
        assert [len(load) for load in entry["load"]] == [4] * 4
        assert all(sum(load) == pytest.approx(1, abs=1e-3) for load in entry["load"])
        assert entry["experts_per_token"] == [2.0] * 4
        assert all(0 < value <= torch.tensor(4.0).log() + 1e-3 for value in entry["entropy"])
    half = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert len(half["stateful_callbacks"]["molora"]["history"]["molora/"]["entries"]) == 2


def test_a_long_history_gets_coarser_and_keeps_its_ends():
    history = {}
    for step in range(1, 2 * MAX_ENTRIES):
        add_to_history(history, step, {"molora/": tally_of([1, 3])})
    steps = [entry["step"] for entry in history["molora/"]["entries"]]
    assert steps[0] == 1
    assert steps[-1] == 2 * MAX_ENTRIES - 1
    assert MAX_ENTRIES / 2 <= len(steps) <= MAX_ENTRIES
    assert steps == sorted(set(steps))


def test_linears_that_did_not_run_are_missing_in_the_history_and_not_shifted():
    history = {}
    add_to_history(history, 1, {"molora/": tally_of([1, 3], [2, 2])})
    one = tally_of([2, 2])
    add_to_history(history, 2, {"molora/": RoutingTally(("layers.1",), *one._columns())})
    assert history["molora/"]["entries"][1]["load"] == [None, [0.5, 0.5]]
    later = RoutingTally(("layers.2",), *tally_of([1, 3])._columns())
    add_to_history(history, 3, {"molora/": later})
    assert history["molora/"]["layers"] == ["layers.0", "layers.1", "layers.2"]
    assert [entry["load"][2] for entry in history["molora/"]["entries"]] == [None, None, [0.25, 0.75]]


def test_a_healthy_training_is_quiet(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="molora.trainers"):
        trainer_for(tmp_path, adapted(TOP_2, {}), max_steps=2).train()
    assert not [record for record in caplog.records if record.name.startswith("molora.trainers")]
