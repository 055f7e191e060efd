"""HPSv2: how well every image fits its prompt by a CLIP model tuned on what people preferred."""

from typing import TYPE_CHECKING

from dmquant.evaluation.metrics.kind import Kind

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages
    from dmquant.evaluation.result import Metric


def hpsv2(scored: "ScoredImages") -> "Metric":
    """Human Preference Score v2.0 (Wu et al. 2023), mean over images of what the hpsv2 package returns: the cosine."""
    return _preference(scored, "2.0", HPSV2)


def hpsv21(scored: "ScoredImages") -> "Metric":
    """Human Preference Score v2 with the weights of version 2.1."""
    return _preference(scored, "2.1", HPSV21)


def _preference(scored: "ScoredImages", version: str, kind: Kind) -> "Metric":
    from dmquant.evaluation.metrics.prompt_cosines import note_of_cut_prompts, prompt_cosines
    from dmquant.evaluation.metrics.summary import summarize

    network = scored.networks.hpsv2(version)
    values = prompt_cosines(scored, network)
    return summarize(values, kind.better, note_of_cut_prompts(scored, network), network.backbone)


HPSV2 = Kind(
    name="hpsv2",
    function=hpsv2,
    title="HPSv2 (v2.0)",
    digits=".4f",
    better="higher",
    needs=frozenset({"prompts"}),
    per_image=True,
)
HPSV21 = Kind(
    name="hpsv21",
    function=hpsv21,
    title="HPSv2 (v2.1)",
    digits=".4f",
    better="higher",
    needs=frozenset({"prompts"}),
    per_image=True,
)
