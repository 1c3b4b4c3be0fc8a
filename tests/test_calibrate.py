"""Calibration on whole tiny models: the errors it reports are those of the outputs, whatever the mixture."""

import methods
import pytest
import tiny
import torch
from methods import inputs_of, watched
from peft import get_peft_model

from molora import MoLoraConfig, MoloraError
from molora.plain.calibrate import batches_by_part, calibrate

CASES = {
    "adamole": {},
    "smora": {},
    "hydralora": {},
    "polytropon": {},
    "polytropon-mhr": {},
    "mor1e-pairs": {},
    "hmoe": {},
    "smear": {},
    "molora": {"shared_experts": 1, "frozen_experts": 2, "router_sharing": "block"},
    "mole": {"kind": "gpt2"},
}


def batches(model, rows=8):
    """One batch to fit to and one of each of the others, with padding in some rows."""
    parts = {}
    for seed, part in enumerate(("fit", "choose", "judge")):
        ids = methods.tokens(rows, 12, seed=seed)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        parts[part] = [{"input_ids": ids, "attention_mask": mask, **inputs_of(model, rows)}]
    return parts


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("preset", CASES)
@torch.no_grad()
def test_reported_errors_are_those_of_the_outputs(preset, rank):
    model = methods.build(preset, **CASES[preset])
    parts = batches(model)
    found = calibrate(model, parts, rank=rank)
    [judged] = parts["judge"]
    with watched(model) as seen:
        model(**judged)
    real = judged["attention_mask"].bool()
    for method, lora in found.loras.items():
        for fit in found.linears:
            one = seen[f"base_model.model.{fit.name}"]
            down, up = lora.factors[fit.name]
            added = (one.y - one.base)[real]
            error = (added - one.x[real] @ down.T @ up.T).square().sum() / added.square().sum()
            assert fit.errors[method] == pytest.approx(float(error), rel=2e-2, abs=1e-5), (method, fit.name)
            assert rank is None or len(down) <= rank


@torch.no_grad()
def test_memory_bounds_the_linears_of_a_pass_and_not_the_result():
    model = methods.build("adamole")
    parts = batches(model)
    whole, pieces = calibrate(model, parts), calibrate(model, parts, max_memory=1)
    for name, (down, up) in whole.loras["calibrated"].factors.items():
        other = pieces.loras["calibrated"].factors[name]
        torch.testing.assert_close(other[1] @ other[0], up @ down, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_constant_takes_up_what_no_linear_map_can():
    model = methods.build("adamole")
    parts = batches(model, rows=24)
    plain, with_bias = calibrate(model, parts), calibrate(model, parts, bias=True)
    assert set(with_bias.loras["calibrated"].biases) == set(plain.loras["calibrated"].factors)
    assert not plain.loras["calibrated"].biases
    assert with_bias.mean_error("calibrated") < 1.1 * plain.mean_error("calibrated")


def test_an_encoder_decoder_is_calibrated_through_its_labels():
    fields = {"target_modules": ["q", "v"], "init_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    model = get_peft_model(tiny.tiny_t5(), MoLoraConfig.from_preset("molora", num_experts=4, r=2, **fields)).eval()
    rows = [(methods.tokens(1, 8, seed=row)[0], methods.tokens(1, 6, seed=100 + row)[0]) for row in range(40)]

    def collate(part):
        ids = torch.stack([row[0] for row in part])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": torch.stack([row[1] for row in part]),
        }

    found = calibrate(model, batches_by_part(rows, collate, 8))
    assert len(found.linears) == 12
    assert found.mean_error("calibrated") < found.mean_error("usage") < 1


def test_too_few_rows_and_missing_parts_are_said():
    model = methods.build("adamole")
    with pytest.raises(MoloraError, match="got 9 calibration rows; give at least ten"):
        batches_by_part(list(range(9)), list, 2)
    with pytest.raises(MoloraError, match="no calibration batches to choose"):
        calibrate(model, {"fit": batches(model)["fit"]})
