"""How quantized models travel: files and folders of other engines, written from what dmquant saved, and read."""
