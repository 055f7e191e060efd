"""Calibration data, and the engine that learns from it block by block."""
