"""The metrics: a file each, with its function and its description; `registry` lists them, `compute` applies them.

The descriptions are read by `dmquant --help`, so a file here imports torch, images and networks inside its function.
"""
