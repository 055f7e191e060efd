"""Scores of every image against the prompt it was made from."""

from typing import TYPE_CHECKING

from torch import Tensor

from dmquant.evaluation.images import generated_images
from dmquant.evaluation.metrics.inputs import Inputs
from dmquant.evaluation.metrics.summary import summarize
from dmquant.evaluation.result import Metric

if TYPE_CHECKING:  # open_clip takes seconds to import
    from dmquant.evaluation.clip import ClipModel


def clip_score(inputs: Inputs) -> Metric:
    """CLIP score: 100 times the cosine of image and prompt in CLIP's features, none below 0, mean over images.

    Hessel et al. 2021 (section 3) weight it with 2.5 in place of 100; diffusion papers and torchmetrics have 100.
    """
    network = inputs.networks.clip
    values = 100 * _cosines(inputs, network).clamp(min=0)
    return summarize(values, higher_is_better=True, note=_note(inputs, network), backbone=network.backbone)


def hpsv2(inputs: Inputs) -> Metric:
    """Human Preference Score v2.0 (Wu et al. 2023), mean over images of what the hpsv2 package returns: the cosine."""
    return _human_preference(inputs, "2.0")


def hpsv21(inputs: Inputs) -> Metric:
    """The same with the weights of v2.1."""
    return _human_preference(inputs, "2.1")


def _human_preference(inputs: Inputs, version: str) -> Metric:
    network = inputs.networks.hpsv2(version)
    values = _cosines(inputs, network)
    return summarize(values, higher_is_better=True, note=_note(inputs, network), backbone=network.backbone)


def _cosines(inputs: Inputs, network: "ClipModel") -> Tensor:
    """The cosine of every image and its prompt, float64 [N]."""
    store, name = inputs.networks.store, network.backbone.name
    texts = store.texts(network, inputs.captions, network.encode_texts, inputs.progress)
    images = store.images(network, generated_images(inputs.images), inputs.progress, name)
    return (images.double() * texts.double()).sum(dim=1)


def _note(inputs: Inputs, network: "ClipModel") -> str | None:
    cut = network.truncated(inputs.captions)
    if not cut:
        return None
    return f"{cut} of {len(inputs.captions)} prompts are longer than the text encoder takes and were cut"
