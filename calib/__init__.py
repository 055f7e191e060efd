"""Calibration data and what is done with it. Empty so far: rounding to nearest needs none."""
