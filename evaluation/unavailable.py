"""What a metric lacks."""

from dmquant.errors import UserError


class UnavailableError(UserError):
    """The weights or the code that a metric looks through are not at hand; the message says what and how to get it."""
