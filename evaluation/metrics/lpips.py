"""LPIPS: perceptual distance of every pair of images, through two networks."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def lpips(scored: "ScoredImages") -> "Metric":
    """Mean LPIPS of the pairs (Zhang et al. 2018, version 0.1) through AlexNet."""
    return _through(scored, "alex", LPIPS)


def lpips_vgg(scored: "ScoredImages") -> "Metric":
    """Mean LPIPS of the pairs (Zhang et al. 2018, version 0.1) through VGG16."""
    return _through(scored, "vgg", LPIPS_VGG)


def _through(scored: "ScoredImages", network: str, kind: Kind) -> "Metric":
    from dmquant.evaluation.metrics.pairs import mean_of_pairs

    distance = scored.networks.lpips(network)
    return mean_of_pairs(
        scored, kind, distance, least_side=distance.smallest, why="its network needs", backbone=distance.backbone
    )


LPIPS = Kind(
    name="lpips",
    function=lpips,
    title="LPIPS (AlexNet)",
    digits=".4f",
    better="lower",
    needs=frozenset({"reference"}),
    per_image=True,
)
LPIPS_VGG = Kind(
    name="lpips_vgg",
    function=lpips_vgg,
    title="LPIPS (VGG16)",
    digits=".4f",
    better="lower",
    needs=frozenset({"reference"}),
    per_image=True,
)
