"""SSIM and MS-SSIM: structural similarity of every pair of images, at one scale and over five.

Their titles say whose: torchmetrics counts the border, mirrored, where others leave it out (docs/evaluation.md).
"""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def ssim(scored: "ScoredImages") -> "Metric":
    """Mean structural similarity of the pairs (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, RGB, 8 bits.

    As torchmetrics has it: the window overhangs the border, which is mirrored.
    """
    from dmquant.evaluation import structural_similarity
    from dmquant.evaluation.metrics.pairs import mean_of_pairs

    return mean_of_pairs(
        scored,
        SSIM,
        structural_similarity.ssim,
        least_side=structural_similarity.WINDOW,
        why="the window of SSIM needs",
    )


def ms_ssim(scored: "ScoredImages") -> "Metric":
    """Mean multi-scale structural similarity of the pairs (Wang et al. 2003), over the five scales of the paper.

    As torchmetrics has it: the mirrored border counts at the last scale.
    """
    from dmquant.evaluation import structural_similarity
    from dmquant.evaluation.metrics.pairs import mean_of_pairs

    return mean_of_pairs(
        scored,
        MS_SSIM,
        structural_similarity.ms_ssim,
        least_side=structural_similarity.MULTI_SCALE_SIDE,
        why="five scales need",
    )


SSIM = Kind(
    name="ssim",
    function=ssim,
    title="SSIM (torchmetrics)",
    digits=".4f",
    better="higher",
    needs=frozenset({"reference"}),
    per_image=True,
    default=True,
)
MS_SSIM = Kind(
    name="ms_ssim",
    function=ms_ssim,
    title="MS-SSIM (torchmetrics)",
    digits=".4f",
    better="higher",
    needs=frozenset({"reference"}),
    per_image=True,
)
