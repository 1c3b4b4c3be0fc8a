"""The packed-bank products: the plain form, by layout, here; the faster forms in the other files of this room."""

from molora.kernels.reference import factors, pairs, separate, shared_a, split_factors

__all__ = ["factors", "pairs", "separate", "shared_a", "split_factors"]
