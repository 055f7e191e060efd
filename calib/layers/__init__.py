"""Fits to the data of one layer: scales, formats, transforms, ranges."""
