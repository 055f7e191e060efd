"""The error of a later output: a unit is learned by what the blocks after it, in full precision, make of its error.

Where a window (CBQ, arXiv 2312.07950) quantizes the blocks that it looks through, these stay as they are: an error that
they take away costs nothing, and one that they enlarge costs what it becomes.
"""

from pydantic import Field

from dmquant.calib.objectives import mse


class Options(mse.Options):
    """Options of the cross-block error in a recipe."""

    ahead: int = Field(default=1, ge=0)
    """Blocks after the unit's last one, as far as there are, at whose end the error is measured (`tasks_of`)."""


start = mse.SquaredError
"""The objective of one unit, whose data are those of the later output."""
