"""Calibration data: calls of the full-precision backbone, chosen, captured and stored."""
