"""Callbacks by which long-running work reports its progress."""

from typing import Protocol


class Progress(Protocol):
    """Called as `progress(what, done, total)` after every item; `what` is a short phrase for people."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def silent(what: str, done: int, total: int) -> None:
    """The `Progress` that shows nothing."""
