"""`molora env`: what a bug report should contain."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "molora",
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "accelerate",
    "triton",
    "pydantic",
    "pyyaml",
)


def run() -> int:
    """Print the facts, one to a line."""
    pairs = facts()
    width = max(map(len, pairs))
    sys.stdout.write("".join(f"{name.ljust(width)}  {value}\n" for name, value in pairs.items()))
    return 0


def facts() -> dict[str, str]:
    """Versions, devices and settings by name."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": f"{torch.version.cuda or 'not built in'}; devices: {', '.join(devices) or 'none'}",
        "kernels": os.environ.get("MOLORA_KERNELS", "auto"),
        "model cache": HF_HUB_CACHE,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
