"""What is fitted to one layer's data: scales, formats, transforms, ranges."""
