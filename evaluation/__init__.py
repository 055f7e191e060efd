"""Images, metrics, grids and reports: what quantization cost against full precision.

Knows images and numbers only; nothing here needs quantization code or a pipeline.
"""
