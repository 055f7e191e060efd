"""Fit a transform and the codes beside it to each other in turn."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dmquant.transforms.base import Transform


def alternate(
    transforms: Sequence[Transform],
    parts: dict[str, dict[str, Tensor]],
    weight: Tensor,
    rounded: Callable[[Tensor], Tensor],
    seen: Callable[[Tensor], Tensor] = lambda lost: lost.flatten(1),
) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """`parts` and `weight`, as `chains` gives them, once those transforms that alternate have had their turns.

    In a turn a transform is fitted to what the codes leave of the float32 weight, then the codes to what it leaves.
    The turn of least error is kept, the first among equals, so none makes it worse.

    Args:
        rounded: the values that the codes of a weight stand for, in its shape.
        seen: (rows, n), of a part of a weight, as large as what outputs see of it: its squared norm is the error. By
            default the part itself.
    """
    for transform in transforms:
        if not transform.turns():
            continue
        exact = transform.undo(weight, parts[transform.name])
        own, least, kept = parts[transform.name], None, None
        for turn in range(transform.turns() + 1):
            remaining = transform.to_quantize(exact, own)
            values = rounded(remaining)
            error = seen(remaining - values).square().sum().item()
            if least is None or error < least:
                least, kept = error, (own, remaining)
            if turn < transform.turns():
                left = exact - values
                own = transform.refit(left, seen(left))
        own, weight = kept
        parts = parts | {transform.name: own}
    return parts, weight
