"""Defaults of the commands. Imports nothing, so that help texts can name it."""

DEFAULT_RECIPE = "default"
SWEEP_BITS, SWEEP_TECHNIQUES = "3-8", "rtn"
