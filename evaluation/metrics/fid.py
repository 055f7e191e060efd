"""FID: Fréchet distance between two sets of images in the features of Inception-v3."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind
from dmquant.evaluation.result import Metric

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.image_sets import ImageSets
    from dmquant.evaluation.metrics.scored_images import ScoredImages


def fid_fp(scored: "ScoredImages") -> Metric:
    """Fréchet Inception distance (Heusel et al. 2017) between the images and the full-precision ones."""
    from dmquant.evaluation.metrics.image_sets import against_full_precision

    return _fid(against_full_precision(scored, "FID"))


def fid_real(scored: "ScoredImages") -> Metric:
    """Fréchet Inception distance between the images and real ones."""
    from dmquant.evaluation.metrics.image_sets import against_real

    return _fid(against_real(scored, "FID"))


def _fid(sets: "ImageSets") -> Metric:
    from dmquant.evaluation.set_distances import frechet_distance

    network, note = sets.scored.networks.inception, sets.note
    a, b = sets.features(network, "Inception features")
    dimension = a.shape[1]
    if sets.smaller <= dimension:
        note += (
            f": fewer than {dimension + 1:,}, so the covariance of {dimension:,} features is rank-deficient; compare "
            "only at equal counts, and look at KID and CMMD instead"
        )
    return Metric(frechet_distance(a, b), images=len(sets.images), backbone=network.backbone, note=note)


FID_FP = Kind(
    name="fid_fp",
    function=fid_fp,
    title="FID against full precision",
    digits=".2f",
    better="lower",
    needs=frozenset({"reference"}),
    default=True,
)
FID_REAL = Kind(
    name="fid_real",
    function=fid_real,
    title="FID against real images",
    digits=".2f",
    better="lower",
    needs=frozenset({"real"}),
    default=True,
)
