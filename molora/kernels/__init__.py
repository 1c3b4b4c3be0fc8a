"""The packed-bank product. Today one implementation, in plain torch."""

from molora.kernels.reference import gated_lora

__all__ = ["gated_lora"]
