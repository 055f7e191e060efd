"""PSNR: peak signal-to-noise ratio of every pair of images."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric

CAP = 100.0  # dB, what a pair of identical images counts as; one 8-bit step in a 64x64 image is 89 dB


def psnr(scored: "ScoredImages") -> "Metric":
    """Mean peak signal-to-noise ratio of the pairs in dB, each capped at 100 dB (identical images are infinite)."""
    from dmquant.evaluation.metrics.pairs import values_of_pairs
    from dmquant.evaluation.metrics.summary import summarize

    of_pairs = values_of_pairs(scored, PSNR, decibels, most=CAP)
    identical = int(of_pairs.values.isinf().sum())
    capped = f"{identical} of {len(of_pairs.values)} pairs are identical and count as {CAP:.0f} dB"
    notes = "; ".join(filter(None, (capped if identical else None, of_pairs.note)))
    return summarize(of_pairs.values.clamp(max=CAP), PSNR.better, note=notes or None)


def decibels(image: "Tensor", reference: "Tensor") -> "Tensor":
    """PSNR in dB, float64 [N], of images uint8 [N, 3, H, W]; infinite where a pair is identical."""
    squared = (image.int() - reference.int()).square().flatten(1)
    mean = squared.sum(1).double() / squared.shape[1]  # integers are summed exactly
    return 10 * (255.0**2 / mean).log10()


PSNR = Kind(
    name="psnr",
    function=psnr,
    title="PSNR",
    unit=" dB",
    digits=".2f",
    better="higher",
    needs=frozenset({"reference"}),
    per_image=True,
    default=True,
)
