"""Every test runs offline and from a fixed seed."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", CI="1")

import pytest
import torch

# Tiny models run fastest on one thread, and by far so on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of LoRAs that differ in rank, alpha, scaling, patterns and targets."""
    from loras import MIXED, save_lora

    root = tmp_path_factory.mktemp("loras")
    return [save_lora(root / f"lora{seed}", seed, **fields) for seed, fields in enumerate(MIXED)]


@pytest.fixture
def products(monkeypatch):
    """Counts the reads of an input by the fast path."""
    from molora.kernels.stacked import StackedDown

    calls = []
    apply = StackedDown.apply
    monkeypatch.setattr(StackedDown, "apply", lambda *given: (calls.append(given), apply(*given))[1])
    return calls
