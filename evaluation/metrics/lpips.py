"""LPIPS: perceptual distance of every pair of images, through two networks."""

from functools import partial
from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def lpips(scored: "ScoredImages", network: str) -> "Metric":
    """Mean LPIPS of the pairs (Zhang et al. 2018, version 0.1) through `network`: alex or vgg."""
    from dmquant.evaluation.metrics.pairs import mean_of_pairs

    distance = scored.networks.lpips(network)
    return mean_of_pairs(
        scored,
        "LPIPS",
        distance,
        higher_is_better=False,
        least_side=distance.smallest,
        why="its network needs",
        backbone=distance.backbone,
    )


LPIPS = Kind(
    name="lpips",
    function=partial(lpips, network="alex"),
    title="LPIPS (AlexNet)",
    digits=".4f",
    better="lower",
    needs=frozenset({"reference"}),
    per_image=True,
)
LPIPS_VGG = Kind(
    name="lpips_vgg",
    function=partial(lpips, network="vgg"),
    title="LPIPS (VGG16)",
    digits=".4f",
    better="lower",
    needs=frozenset({"reference"}),
    per_image=True,
)
