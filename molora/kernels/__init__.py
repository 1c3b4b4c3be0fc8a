"""The packed-bank products. Today one implementation, in plain torch."""

from molora.kernels.reference import factors, pairs, separate, shared_a, split_factors

__all__ = ["factors", "pairs", "separate", "shared_a", "split_factors"]
