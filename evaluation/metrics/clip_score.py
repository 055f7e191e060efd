"""CLIP score: how well every image fits its prompt, as a CLIP model sees it."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def clip_score(scored: "ScoredImages") -> "Metric":
    """CLIP score: 100 times the cosine of image and prompt in CLIP's features, none below 0, mean over images.

    Hessel et al. 2021 (section 3) weight it with 2.5 in place of 100; diffusion papers and torchmetrics have 100.
    """
    from dmquant.evaluation.metrics.prompt_cosines import note_of_cut_prompts, prompt_cosines
    from dmquant.evaluation.metrics.summary import summarize

    network = scored.networks.clip
    values = 100 * prompt_cosines(scored, network).clamp(min=0)
    return summarize(values, CLIP_SCORE.better, note_of_cut_prompts(scored, network), network.backbone)


CLIP_SCORE = Kind(
    name="clip_score",
    function=clip_score,
    title="CLIP score",
    digits=".2f",
    better="higher",
    needs=frozenset({"clip", "prompts"}),
    per_image=True,
    default=True,
)
