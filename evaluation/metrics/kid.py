"""KID: squared maximum mean discrepancy between two sets of images in the features of Inception-v3."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.image_sets import ImageSets
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def kid_fp(scored: "ScoredImages") -> "Metric":
    """Kernel Inception distance (Bińkowski et al. 2018) between the images and the full-precision ones.

    Over all images at once, not averaged over random subsets: it is unbiased either way, and may be below zero.
    The two images of a pair are no independent draws, so that the kernel between them is left out; where it is counted,
    as by torchmetrics, sets of the same prompts and noise come out far below zero.
    """
    from dmquant.evaluation.metrics.image_sets import against_full_precision

    return _kid(against_full_precision(scored, "KID"), paired=True)


def kid_real(scored: "ScoredImages") -> "Metric":
    """Kernel Inception distance between the images and real ones."""
    from dmquant.evaluation.metrics.image_sets import against_real

    return _kid(against_real(scored, "KID"), paired=False)


def _kid(sets: "ImageSets", paired: bool) -> "Metric":
    from dmquant.evaluation.metrics.image_sets import metric_of_distance
    from dmquant.evaluation.set_distances import polynomial_kernel, squared_mmd

    network = sets.scored.networks.inception
    a, b = sets.features(network, "Inception features")
    return metric_of_distance(sets, network, *squared_mmd(a, b, polynomial_kernel, unbiased=True, paired=paired))


KID_FP = Kind(
    name="kid_fp",
    function=kid_fp,
    title="KID against full precision",
    digits="#.3g",
    better="lower",
    needs=frozenset({"reference"}),
)
KID_REAL = Kind(
    name="kid_real",
    function=kid_real,
    title="KID against real images",
    digits="#.3g",
    better="lower",
    needs=frozenset({"real"}),
)
