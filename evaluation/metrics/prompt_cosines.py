"""Metrics of single images: the cosine of the features of an image and of its prompt."""

from torch import Tensor

from dmquant.evaluation.images import generated_images
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.networks.clip import ClipModel


def prompt_cosines(scored: ScoredImages, network: ClipModel) -> Tensor:
    """The cosine of every image and its prompt, float64 [N]."""
    store, name = scored.networks.store, network.backbone.name
    texts = store.texts(network, scored.captions, network.encode_texts, scored.progress)
    images = store.images(network, generated_images(scored.images), scored.progress, name)
    return (images.double() * texts.double()).sum(dim=1)


def note_of_cut_prompts(scored: ScoredImages, network: ClipModel) -> str | None:
    """A note on the number of prompts longer than the network's text encoder takes; None where none is."""
    cut = network.truncated(scored.captions)
    if not cut:
        return None
    return f"{cut} of {len(scored.captions)} prompts are longer than the text encoder takes and were cut"
