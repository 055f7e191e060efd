"""Errors for the person at the keyboard are one line, whatever they quote."""

from dmquant.errors import UsageError, UserError, unknown


def test_an_error_is_one_line_of_bounded_length_whatever_it_quotes():
    error = unknown("granularity", "t\n\x85ken", ["token"], "use tensor, channel or token")
    assert isinstance(error, UsageError)
    assert str(error) == "unknown granularity 't ken': did you mean 'token'? use tensor, channel or token"
    assert len(str(UserError("quoted: " + 10_000 * "x"))) <= 2000
