"""What the rest of its batch does to an image: a comparison of images says nothing of smaller differences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from dmquant.evaluation.generate import ImageRequest, pixels_alone
from dmquant.evaluation.images import load_frames
from dmquant.evaluation.metrics.psnr import PSNR, decibels
from dmquant.evaluation.result import BatchMates, Metric
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.pipelines.runs.image_stage import TITLES, as_settings_say
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def note_batch_mates(
    side: str,
    requests: Sequence[ImageRequest],
    load: Callable[[], "DiffusionPipeline"],
    folder: RunFolder,
    settings: Settings,
    console: Console,
) -> None:
    """Make the first image of a side once more, alone, and note how far it is from that of the run, if not yet known.

    Nothing is noted where images are made one at a time: then none has any other in its batch. What is known of an
    image stays when the size of batches changes, as the image does.
    """
    together = min(settings.batch_size, len(requests))
    known = folder.notes(_kind(side))
    if known and known["image"] == requests[0].key:
        return
    if together == 1:
        if known:  # of an image that is no more
            folder.note(_kind(side), {})
        return

    def measure() -> BatchMates:
        pipeline = load()
        with console.bar(f"{TITLES[side]}: the first alone") as bar, as_settings_say(pipeline, settings):
            bar(0, 1)
            alone = pixels_alone(settings.prompted(pipeline), requests[0], settings.call)
            bar(1, 1)
        there = load_frames(folder.images(side) / requests[0].name)
        pair = there[None], torch.from_numpy(alone).movedim(-1, -3)[None]
        apart = decibels(*pair).item()
        return BatchMates(together, None if apart == float("inf") else apart)

    mates = processes.current().on_main(measure)
    folder.note(_kind(side), {"image": requests[0].key, **asdict(mates)})
    console.say(f"{TITLES[side]}: the first alone and in its batch of {together}: {in_words(mates)}")


def batch_mates(folder: RunFolder, side: str) -> BatchMates | None:
    """What `note_batch_mates` noted of a side; None where it noted nothing."""
    known = folder.notes(_kind(side))
    return BatchMates(known["images"], known["psnr"]) if known else None


def with_batch_mates(
    metrics: Mapping[str, Metric], reference: BatchMates | None, quantized: BatchMates | None
) -> dict[str, Metric]:
    """The metrics of a recipe, with what the batch does to images in the note of PSNR, as far as it was measured."""
    apart = {"full precision": reference, "quantized": quantized}
    told = [f"{side} {in_words(mates)}" for side, mates in apart.items() if mates]
    psnr = metrics.get(PSNR.name)
    if psnr is None or psnr.value is None or not told:
        return dict(metrics)
    together = (reference or quantized).images
    note = f"the first image alone and in its batch of {together}: {', '.join(told)}"
    return {**metrics, PSNR.name: replace(psnr, note="; ".join(filter(None, (psnr.note, note))))}


def in_words(mates: BatchMates) -> str:
    """The word "equal", or PSNR in dB."""
    return "equal" if mates.psnr is None else PSNR.text(mates.psnr)


def _kind(side: str) -> str:
    return f"batch_mates_{side}"
