"""CMMD: squared maximum mean discrepancy between two sets of images in the features of a CLIP model."""

from dataclasses import replace
from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.image_sets import ImageSets
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric

SCALE = 1000.0


def cmmd_fp(scored: "ScoredImages") -> "Metric":
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024) between the images and the full-precision ones."""
    from dmquant.evaluation.metrics.image_sets import against_full_precision

    return _cmmd(against_full_precision(scored, "CMMD"), paired=True)


def cmmd_real(scored: "ScoredImages") -> "Metric":
    """CLIP maximum mean discrepancy between the images and real ones."""
    from dmquant.evaluation.metrics.image_sets import against_real

    return _cmmd(against_real(scored, "CMMD"), paired=False)


def _cmmd(sets: "ImageSets", paired: bool) -> "Metric":
    from dmquant.evaluation.metrics.image_sets import metric_of_distance
    from dmquant.evaluation.networks import CLIP
    from dmquant.evaluation.set_distances import gaussian_kernel, squared_mmd

    networks = sets.scored.networks
    a, b = sets.features(networks.clip, "CLIP image features")
    distance = squared_mmd(a, b, gaussian_kernel, unbiased=False, paired=paired)
    if networks.clip_name != CLIP:
        sets = replace(sets, note=f"{sets.note}; published CMMD looks through {CLIP}")
    return metric_of_distance(sets, networks.clip, *distance, SCALE)


CMMD_FP = Kind(
    name="cmmd_fp",
    function=cmmd_fp,
    title="CMMD against full precision",
    digits="#.3g",
    better="lower",
    needs=frozenset({"reference", "clip"}),
)
CMMD_REAL = Kind(
    name="cmmd_real",
    function=cmmd_real,
    title="CMMD against real images",
    digits="#.3g",
    better="lower",
    needs=frozenset({"real", "clip"}),
)
