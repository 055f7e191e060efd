"""Fit a transform and the codes beside it to each other in turn."""

from collections.abc import Callable, Sequence

from torch import Tensor

from dmquant.transforms.interfaces import Parts, Storage
from dmquant.transforms.registry import fit_of


def alternate(
    transforms: Sequence[Storage],
    parts: dict[str, Parts],
    weight: Tensor,
    rounded: Callable[[Tensor], Tensor],
    seen: Callable[[Tensor], Tensor] = lambda lost: lost.flatten(1),
) -> tuple[dict[str, Parts], Tensor]:
    """Alternate between a transform and the codes (SVDQuant, arXiv 2411.05007; CALDERA, arXiv 2405.18886).

    In a turn a transform is fitted to the error of the codes, then the codes to the float32 weight less the transform.
    The turn of least error is kept, the first among equals, so none makes it worse.

    Args:
        parts: by method, and `weight`, float32 (output channels, ...), as `chains` yields them; returned alike.
        rounded: a weight -> the decoded values of its codes, in its shape.
        seen: a weight's error -> float32 (rows, n), whose squared norm is the error of the output. By default the
            error itself.
    """
    for transform in transforms:
        fit = fit_of(transform)
        if not fit.turns:
            continue
        exact = transform.undo(weight, parts[transform.name])
        own, least, kept = parts[transform.name], None, None
        for turn in range(fit.turns + 1):
            remaining = transform.to_quantize(exact, own)
            values = rounded(remaining)
            error = seen(remaining - values).square().sum().item()
            if least is None or error < least:
                least, kept = error, (own, remaining)
            if turn < fit.turns:
                lost = exact - values
                own = fit.refit(transform, lost, seen(lost))
        own, weight = kept
        parts = parts | {transform.name: own}
    return parts, weight
