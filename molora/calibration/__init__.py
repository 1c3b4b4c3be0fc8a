"""Routers that start from data: their statistics, their rows and their balance, from one pass over training rows."""

from molora.calibration.job import calibrate_routers, needs_calibration

__all__ = ["calibrate_routers", "needs_calibration"]
