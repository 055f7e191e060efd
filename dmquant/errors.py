"""Errors meant for the person at the keyboard: one line, what is wrong and what to do."""

import difflib
from collections.abc import Iterable

LONGEST = 100  # characters of a name, and of one that a message quotes


class UserError(Exception):
    """Something the user can put right; the command line prints the message alone and exits with 1."""

    exit_code = 1

    def __str__(self) -> str:
        return " ".join(super().__str__().split())[:2000]


class UsageError(UserError, ValueError):
    """The command itself is wrong (an unknown name, an option that makes no sense); exits with 2."""

    exit_code = 2


def unknown(kind: str, name: str, choices: Iterable[str], hint: str) -> UsageError:
    """A UsageError like "unknown format 'fp44': did you mean 'fp4'? `dmquant formats` lists them"."""
    name = name if len(name) <= LONGEST else f"{name[:LONGEST]}..."
    likely = "".join(f" did you mean '{one}'?" for one in difflib.get_close_matches(name, list(choices), 1, 0.5))
    return UsageError(f"unknown {kind} '{name}':{likely} {hint}")


def check_choice(kind: str, name: str, choices: Iterable[str]) -> str:
    """`name` if it is one of `choices`, else a UsageError with the nearest one."""
    if name not in choices:
        raise unknown(kind, name, choices, f"known: {', '.join(choices)}")
    return name
