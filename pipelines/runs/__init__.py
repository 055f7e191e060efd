"""Runs: a folder, and everything that is done in it."""
