"""Kernels that fail or are wrong on a device are not used there, and somebody is told."""

import logging

import pytest
import torch

import molora.kernels.triton
from molora.kernels import selfcheck

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    selfcheck._works.cache_clear()
    yield
    selfcheck._works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_that_work_are_used(dtype, caplog):
    state = torch.get_rng_state()
    assert selfcheck.works(CPU, dtype)
    assert not caplog.records
    assert torch.equal(torch.get_rng_state(), state)


def _raise(*given):
    raise RuntimeError("no compiler found")


def _wrong(function):
    def changed(*given):
        result = function(*given)
        result.y.mul_(1.01)
        return result

    return changed


def _not_a_number(function):
    def changed(*given):
        result = function(*given)
        result.y[3, 3] = torch.nan
        return result

    return changed


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_raise, "RuntimeError: no compiler found"),
        (_wrong(molora.kernels.triton.mixture_forward), "differ from the torch form by up to 1"),
        (_not_a_number(molora.kernels.triton.mixture_forward), "differ from the torch form by up to inf"),
    ],
)
def test_kernels_that_fail_or_disagree_are_left_out(function, says, monkeypatch, caplog):
    monkeypatch.setattr(molora.kernels.triton, "mixture_forward", function)
    with caplog.at_level(logging.WARNING, "molora.kernels"):
        assert not selfcheck.works(CPU, torch.float32)
        assert not selfcheck.works(CPU, torch.float32)
    (record,) = caplog.records
    assert says in record.getMessage()
    assert "MOLORA_KERNELS=torch" in record.getMessage()


def test_other_dtypes_are_not_asked_about(caplog):
    assert not selfcheck.works(CPU, torch.float64)
    assert not caplog.records
