"""Routers that start from data: what cannot be calibrated is refused, and impossible settings are named."""

from __future__ import annotations

import pytest
import torch
from calibrated import FROM_DATA, adapted, batches

from molora import ConfigError, MoLoraConfig, MoloraError
from molora.calibration import calibrate_routers, needs_calibration


@pytest.mark.parametrize(
    ("experts", "fields", "message"),
    [
        ([4], {}, "indices from 0 to 3"),
        ([0, 0], {}, "different indices"),
        ([], {}, "different indices"),
        ([0, 1, 2, 3], {}, "leave `experts` out"),
        ([3], {"router_bias": False}, "router_bias=True"),
    ],
    ids=str,
)
def test_experts_that_cannot_be_calibrated_are_refused(experts, fields, message):
    with pytest.raises(MoloraError, match=message):
        calibrate_routers(adapted(**fields), batches(), experts=experts)


def test_a_router_is_calibrated_whole_before_it_grows():
    with pytest.raises(MoloraError, match="seen no data"):
        calibrate_routers(adapted(calibrated=False), batches(), experts=[3])


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"router_norm": "none", "router_init": "kaiming_uniform"}, batches(), "router_norm='standardize'"),
        ({}, [], "no calibration batches"),
        (
            {},
            [{"attention_mask": torch.zeros(2, 4, dtype=torch.long), "input_ids": torch.ones(2, 4).long()}],
            "no real token",
        ),
    ],
    ids=["nothing to calibrate", "no batches", "padding only"],
)
def test_calibrations_of_nothing_are_refused(fields, given, message):
    with pytest.raises(MoloraError, match=message):
        calibrate_routers(adapted(calibrated=False, **fields), given)


def test_values_that_are_not_finite_are_named():
    model = adapted(False)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[50] = torch.nan
    with pytest.raises(MoloraError, match=r"q_proj reads values that are not finite.*eager"):
        calibrate_routers(model, [{"input_ids": torch.full((4, 6), 50)}])


def test_only_an_active_adapter_is_calibrated():
    model = adapted(False)
    model.add_adapter("b", MoLoraConfig(num_experts=4, target_modules=["q_proj"], **FROM_DATA))
    with pytest.raises(MoloraError, match=r"set_adapter\('b'\)"):
        calibrate_routers(model, batches(), "b")
    with model.disable_adapter(), pytest.raises(MoloraError, match="switched off"):
        calibrate_routers(model, batches())
    model.set_adapter("b")
    calibrate_routers(model, batches(), "b")
    assert not needs_calibration(model, "b")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"router_norm": "none"}, "router_init"),
        ({"router": "mlp"}, "router_norm"),
        ({"router_norm": "whiten"}, "router_norm"),
        ({"router_confidence": 0.2}, "router_confidence"),
        ({"router_confidence": 1.5}, "router_confidence"),
        ({"router_norm": "none", "router_init": "normal", "router_confidence": 0.7}, "router_confidence"),
        ({"router_norm": "none", "router_init": "normal", "calibration_rows": 5}, "calibration_rows"),
        ({"calibration_rows": 0}, "calibration_rows"),
        ({"router_input": "base"}, "router_norm"),
        ({"router_sharing": "weights"}, "router_norm"),
        ({"threshold_start": 0.5}, "threshold_start"),
        ({"experts_per_token": 2.0}, "experts_per_token"),
        ({"selection": "adaptive_threshold", "top_k": None, "experts_per_token": 4.0}, "experts_per_token"),
        (
            {"selection": "adaptive_threshold", "top_k": None, "experts_per_token": 2.0, "max_threshold": 0.3},
            "max_threshold",
        ),
        ({"router_lr_ratio": 0}, "router_lr_ratio"),
        ({"freeze_router": True, "router_lr_ratio": 2.0}, "router_lr_ratio"),
        ({"selection": "adaptive_threshold", "top_k": None, "threshold_start": 1.0}, "threshold_start"),
    ],
    ids=str,
)
def test_impossible_starts_are_config_errors(fields, field):
    with pytest.raises(ConfigError) as caught:
        MoLoraConfig(**{"num_experts": 4, "target_modules": ["q_proj"], **FROM_DATA, **fields})
    assert field in {problem.field for problem in caught.value.problems}
