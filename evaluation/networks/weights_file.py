"""Weights files that are known by their hash."""

from pathlib import Path

from dmquant.errors import UserError
from dmquant.evaluation.result import Backbone
from dmquant.host.files import sha256


def checked(path: Path, name: str, start: str) -> Backbone:
    """The backbone called `name` at `path`; raises UserError unless its SHA-256 begins with `start`."""
    digest = sha256(path)
    if not digest.startswith(start):
        raise UserError(
            f"{path} is damaged or not the original: its SHA-256 is {digest}, expected {start}; remove it and "
            "install it again"
        )
    return Backbone(name, digest)
