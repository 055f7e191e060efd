"""Two sets of images in the features of a network: what FID, KID and CMMD have in common."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dmquant.evaluation.images import any_images, generated_images
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.networks.features import ImageNetwork
from dmquant.evaluation.result import Metric, UnavailableError

NORMAL_95 = 1.96  # standard errors on each side of a 95 % interval


@dataclass(frozen=True)
class ImageSets:
    """The images scored and the others that they are compared with; `note` says how many of which."""

    scored: ScoredImages
    images: list[Path]
    others: list[Path]
    note: str

    @property
    def smaller(self) -> int:
        """The number of images in the smaller set."""
        return min(len(self.images), len(self.others))

    def features(self, network: ImageNetwork, what: str) -> tuple[Tensor, Tensor]:
        """Features [N, D] and [M, D] of both sets, float32 on the networks' device; `what` names the progress bar."""
        networks, progress = self.scored.networks, self.scored.progress
        a, b = (networks.store.images(network, paths, progress, what) for paths in (self.images, self.others))
        return a.to(networks.device), b.to(networks.device)


def against_full_precision(scored: ScoredImages, metric: str) -> ImageSets:
    """The images and the full-precision ones; raises UnavailableError, naming the `metric`, for fewer than 2."""
    return _sets(scored, metric, scored.pairs.reference, "full-precision")


def against_real(scored: ScoredImages, metric: str) -> ImageSets:
    """The images and the real ones; raises UnavailableError for fewer than 2, and where no real ones were given."""
    if scored.real is None:
        raise UnavailableError("no real images given: pass --real DIR")
    return _sets(scored, metric, any_images(scored.real), "real")


def metric_of_distance(
    sets: ImageSets, network: ImageNetwork, distance: float, error: float | None, scale: float = 1.0
) -> Metric:
    """The scaled distance with its 95 % interval, where there is a standard error."""
    low, high = (None, None) if error is None else (distance - NORMAL_95 * error, distance + NORMAL_95 * error)
    value, low, high = (None if number is None else scale * number for number in (distance, low, high))
    return Metric(value, low, high, images=len(sets.images), backbone=network.backbone, note=sets.note)


def _sets(scored: ScoredImages, metric: str, others: list[Path], kind: str) -> ImageSets:
    images = generated_images(scored.images)
    if min(len(images), len(others)) < 2:
        raise UnavailableError(f"{metric} needs at least 2 images on each side")
    return ImageSets(scored, images, others, f"{len(images)} against {len(others)} {kind} images")
