"""Quantization-aware recovery: a quantized backbone learns from the full-precision one, end to end."""
