"""Routers that start from data: molora's trainers calibrate them with rows of the training data."""

from __future__ import annotations

import itertools
import random

import kinds
import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from routers import adapted, assert_same, trainer_for, values

from molora import MoloraError
from molora.calibration import needs_calibration
from molora.trainers import MoLoraTrainer
from molora.trainers import calibration as trainers_calibration

FROM_DATA = {"router_norm": "standardize", "calibration_rows": 6, "init_weights": True}


def awaiting(**overrides):
    return adapted("mole", **{**FROM_DATA, "router_init": "prototypes", **overrides})


def statistics(model):
    return {name: value for name, value in values(model).items() if "input_mean" in name}


@pytest.fixture
def calls(monkeypatch):
    """Batches that each calibration was given."""
    seen, real = [], trainers_calibration.calibrate_routers

    def watched(model, batches, *args, **kwargs):
        seen.append(batches)
        return real(model, batches, *args, **kwargs)

    monkeypatch.setattr(trainers_calibration, "calibrate_routers", watched)
    return seen


@pytest.mark.parametrize("kind", ["transformers", "sft", "seq2seq", "dpo", "reward", "kto"])
def test_every_trainer_calibrates_its_routers_before_the_first_step(kind, tmp_path, calls):
    targets = {"target_modules": ["q", "wo"]} if kind == "seq2seq" else {}
    config = kinds.config(router_norm="standardize", router_init="prototypes", calibration_rows=6, **targets)
    trainer = kinds.trainer_for(kind, tmp_path, kinds.model_for(kind, config))
    assert needs_calibration(trainer.model)
    trainer.train()
    assert not needs_calibration(trainer.model)
    assert len(calls) == 1
    assert all(value.abs().max() > 0 for value in statistics(trainer.model).values())


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("before", [True, False], ids=["calibrated before", "calibrated by the trainer"])
def test_the_reference_of_preferences_is_the_adapter_as_it_starts(kind, before, tmp_path):
    """TRL copies the adapter without its buffers, and the copy is never active in the model that is calibrated."""
    model = kinds.model_for(kind, kinds.config(**{**FROM_DATA, "init_weights": False}))
    if before:
        trainer_for(tmp_path, model, max_steps=1, learning_rate=0.0).train()
    trainer = kinds.trainer_for(kind, tmp_path, model)
    trainer.train()
    logged = kinds.training_log(trainer)
    assert logged["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert logged["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)


def test_calibration_reads_as_many_rows_as_the_config_says(tmp_path, calls):
    trainer_for(tmp_path, awaiting(), per_device_train_batch_size=4).train()
    assert [len(batch["input_ids"]) for batch in calls[0]] == [4, 2]


def test_rows_are_drawn_from_all_of_the_data(tmp_path, calls):
    trainer_for(tmp_path, awaiting(), train=Dataset.from_list(kinds.causal(12))).train()
    first = [row["input_ids"] for row in kinds.causal(6)]
    seen = [ids for batch in calls[0] for ids in batch["input_ids"].tolist()]
    assert {tuple(ids) for ids in seen} - {(*ids, *[0] * (len(seen[0]) - len(ids))) for ids in first}


def test_the_same_seed_calibrates_the_same_whatever_was_drawn_before(tmp_path):
    found = []
    for drawn in (0, 5):
        model = awaiting()
        trainer = trainer_for(tmp_path, model, learning_rate=0.0)
        torch.rand(drawn)
        trainer.train()
        found.append(values(model))
    assert_same(*found)


def test_calibration_disturbs_neither_the_order_of_the_data_nor_what_is_drawn(tmp_path, calls):
    """A model that was calibrated before trains as one that the trainer calibrates."""
    seen = []

    class Watching(MoLoraTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append((inputs["input_ids"].tolist(), torch.rand(1).item(), random.random(), np.random.rand()))
            return super().training_step(model, inputs, *args, **kwargs)

    models = [awaiting(), awaiting()]
    trainer_for(tmp_path, models[0], max_steps=5, trainer_class=Watching).train()
    models[1].load_state_dict(calibrated_state(tmp_path), strict=False)
    trainer_for(tmp_path, models[1], max_steps=5, trainer_class=Watching).train()
    assert len(calls) == 2, "the second model was calibrated once, for its state"
    assert seen[:5] == seen[5:]
    assert_same(values(models[0]), values(models[1]))


def calibrated_state(folder):
    """What a calibration leaves, before any step."""
    model = awaiting()
    trainer_for(folder, model, max_steps=1, learning_rate=0.0).train()
    return values(model)


def test_a_resumed_training_calibrates_nothing_and_is_the_same(tmp_path, calls):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_for(tmp_path / "a", awaiting(), **arguments)
    straight.train()
    resumed = trainer_for(tmp_path / "b", awaiting(), **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert len(calls) == 1
    assert_same(values(resumed.model), values(straight.model))


def test_a_calibrated_adapter_is_trained_on_as_it_is(tmp_path, calls):
    model = awaiting()
    trainer_for(tmp_path, model).train()
    before = statistics(model)
    trainer_for(tmp_path, model).train()
    assert len(calls) == 1
    assert_same(statistics(model), before)


def test_routers_that_read_no_statistics_are_not_calibrated(tmp_path, calls):
    trainer_for(tmp_path, adapted("mole")).train()
    assert not calls


def test_a_stream_gives_its_first_rows_and_is_trained_on_from_its_start(tmp_path, calls):
    rows = kinds.causal(12)
    seen = []

    class Watching(MoLoraTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer_for(tmp_path, awaiting(), train=stream, trainer_class=Watching).train()
    calibrated = [ids for batch in calls[0] for ids in batch["input_ids"].tolist()]
    for got in (calibrated, seen):
        for ids, row in zip(got, rows, strict=False):
            assert ids[: len(row["input_ids"])] == row["input_ids"]
    assert (len(calibrated), len(seen)) == (6, 8)


class Once(torch.utils.data.IterableDataset):
    """Rows that can be read only once."""

    def __init__(self):
        self._rows = itertools.cycle(kinds.causal(12))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._rows)


@pytest.mark.parametrize(
    ("train", "words"),
    [(Once(), "can be read only once"), (IterableDataset.from_generator(lambda: iter(())), "has no row")],
)
def test_data_that_cannot_be_read_beforehand_is_explained(train, words, tmp_path):
    with pytest.raises(MoloraError, match=rf"{words}.*calibrate_routers\(model, batches\)"):
        trainer_for(tmp_path, awaiting(), train=train).train()


@pytest.mark.parametrize("kind", kinds.ONLINE)
def test_trainers_that_make_their_batches_as_they_go_ask_for_a_calibration_by_hand(kind, tmp_path):
    model = kinds.model_for(kind, kinds.config(**FROM_DATA))
    with pytest.raises(MoloraError, match=r"holds prompt.*no input_ids.*calibrate_routers\(model, batches\)"):
        kinds.trainer_for(kind, tmp_path, model).train()


def test_a_model_in_parts_is_not_calibrated(tmp_path):
    model = awaiting()
    next(model.parameters()).ds_id = 0
    with pytest.raises(MoloraError, match="zero3_init_flag: false"):
        trainer_for(tmp_path, model).train()


def test_statistics_of_a_shared_out_model_come_back_from_a_checkpoint(tmp_path):
    trained, fresh = awaiting(), awaiting()
    trainer_for(tmp_path, trained).train()
    trained.save_pretrained(tmp_path / "checkpoint")
    trainers_calibration.restore_statistics(fresh, str(tmp_path / "checkpoint"))
    assert not needs_calibration(fresh)
    assert_same(statistics(fresh), statistics(trained))
