"""HPSv2: how well every image fits its prompt by a CLIP model tuned on what people preferred."""

from functools import partial
from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def hpsv2(scored: "ScoredImages", version: str) -> "Metric":
    """Human Preference Score v2 (Wu et al. 2023), mean over images of what the hpsv2 package returns: the cosine.

    `version` of the weights is 2.0 or 2.1.
    """
    from dmquant.evaluation.metrics.prompt_cosines import note_of_cut_prompts, prompt_cosines
    from dmquant.evaluation.metrics.summary import summarize

    network = scored.networks.hpsv2(version)
    values = prompt_cosines(scored, network)
    note = note_of_cut_prompts(scored, network)
    return summarize(values, higher_is_better=True, note=note, backbone=network.backbone)


HPSV2 = Kind(
    name="hpsv2",
    function=partial(hpsv2, version="2.0"),
    title="HPSv2 (v2.0)",
    digits=".4f",
    better="higher",
    needs=frozenset({"prompts"}),
    per_image=True,
)
HPSV21 = Kind(
    name="hpsv21",
    function=partial(hpsv2, version="2.1"),
    title="HPSv2 (v2.1)",
    digits=".4f",
    better="higher",
    needs=frozenset({"prompts"}),
    per_image=True,
)
