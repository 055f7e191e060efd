"""What calibration learns from: calls of the full-precision backbone, chosen, captured and stored."""
