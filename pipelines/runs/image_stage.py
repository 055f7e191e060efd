"""The stages that make missing images, under a bar, and measure their time and memory."""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmquant.evaluation.generate import Generated, ImageRequest, generate, missing, pruned_and_missing
from dmquant.host import processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.memory import peak_memory
from dmquant.pipelines.runs.footprint import kernels_used
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FP, QUANTIZED = "fp", "quantized"
TITLES = {FP: "full-precision images", QUANTIZED: "quantized images"}


def complete_images(
    side: str,
    requests: Sequence[ImageRequest],
    load: Callable[[], "DiffusionPipeline"],
    folder: RunFolder,
    settings: Settings,
    console: Console,
) -> None:
    """Make the images of one side that its folder lacks, and record their time and memory."""
    images, stage, key = folder.images(side), f"images_{side}", images_key(requests)
    absent = processes.current().on_main(lambda: pruned_and_missing(images, requests))
    if not absent and folder.finished(stage, key):
        console.say(f"{TITLES[side]}: all {len(requests)} are there")
        return
    earlier = folder.record(stage) or {}
    measured = {name: earlier.get(name) for name in ("peak_memory_bytes", "peak_memory_of", "not_finite", "kernels")}
    seconds = _keep_seconds(folder, f"seconds_{side}", requests)
    if absent:
        folder.forget(stage)  # its record of the images is about to be untrue
        with peak_memory(settings.device) as peak:
            pipeline = load()
            generated = make_images(pipeline, requests, images, settings, console, TITLES[side], seconds)
        measured = {
            "peak_memory_bytes": peak.bytes,
            "peak_memory_of": peak.what,
            "not_finite": generated.not_finite,
            "kernels": kernels_used(getattr(pipeline, settings.family.component)),
        }
    folder.finish(stage, key, images=len(requests), **measured)


def images_key(requests: Sequence[ImageRequest]) -> str:
    """Fingerprint of a set of images: the keys of its images stand for all that each depends on."""
    return fingerprint(images=[request.key for request in requests])


def _keep_seconds(folder: RunFolder, kind: str, requests: Sequence[ImageRequest]) -> Callable[[Generated], None]:
    """Drop the seconds of images that nobody asks for; add the seconds of every batch, so that a kill loses none."""
    keys = {request.key for request in requests}
    known = folder.notes(kind)
    if not known.keys() <= keys:
        known = {key: seconds for key, seconds in known.items() if key in keys}
        folder.note(kind, known)
    added: set[str] = set()

    def add(generated: Generated) -> None:
        newest_first = reversed(generated.seconds.items())
        new = dict(itertools.takewhile(lambda item: item[0] not in added, newest_first))
        added.update(new)
        folder.add_notes(kind, new)

    return add


def make_images(
    pipeline: "DiffusionPipeline",
    requests: Sequence[ImageRequest],
    folder: Path,
    settings: Settings,
    console: Console,
    title: str,
    note: Callable[[Generated], None] = lambda generated: None,
) -> Generated:
    """Make the images that `folder` lacks; `note` is called after every batch with all that was made so far."""
    kept, began = len(requests) - len(missing(folder, requests)), time.perf_counter()
    with console.bar(title) as bar:
        bar(kept, len(requests))

        def on_batch(generated: Generated) -> None:
            made = len(generated.seconds)
            bar(kept + made, len(requests), speed=f"{made / (time.perf_counter() - began):.2f} images/s")
            note(generated)

        generated = generate(
            settings.family.prompted(pipeline),
            requests,
            folder,
            batch_size=settings.batch_size,
            call=settings.call,
            on_batch=on_batch,
        )
    seconds, made = time.perf_counter() - began, len(generated.seconds)
    there = f"; {kept} were there" if kept else ""
    console.say(f"{title}: {made} in {seconds:.1f} s, {made / seconds:.2f} images/s{there}")
    if generated.not_finite:
        console.say(f"warning: {generated.not_finite} of them hold NaN or infinity, shown black; try another --dtype")
    return generated
