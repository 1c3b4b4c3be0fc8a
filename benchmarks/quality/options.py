"""Values of options that hold several things."""

from __future__ import annotations


def words(text: str) -> list[str]:
    """`a, b` as its parts."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """`0,1,2` as numbers."""
    return [int(word) for word in words(text)]


def rates(text: str) -> dict[str, float]:
    """`arm=0.001,other=0.002` as rates by arm."""
    pairs = (word.rpartition("=") for word in words(text))
    return {name: float(rate) for name, _, rate in pairs}
