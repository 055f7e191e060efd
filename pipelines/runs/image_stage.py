"""The stages that make missing images, under a bar, and measure their time and memory."""

import contextlib
import itertools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dmquant.diffusers.deterministic import deterministic
from dmquant.errors import UserError
from dmquant.evaluation.generate import (
    Generated,
    ImageRequest,
    generate,
    image_requests,
    prune,
    pruned_and_missing,
    unfinished_batches,
)
from dmquant.evaluation.image_files import PNG, kind_of
from dmquant.evaluation.pictures import save_picture
from dmquant.evaluation.png import read_key
from dmquant.host import owned, processes
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.memory import PeakMemory, peak_memory
from dmquant.pipelines.runs.footprint import kernels_used
from dmquant.pipelines.runs.runfolder import RunFolder
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FP, QUANTIZED = "fp", "quantized"
SESSION = uuid.uuid4().hex[:12]
"""This process: times of images compare with those of the same session, when the machine was as busy."""
INPUTS = {"image": "input", "mask": "mask", "control": "control"}
"""What the images are called that go into a pipeline, by their kind."""
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
    processes.current().on_main(lambda: _refuse_others(images, requests))
    if not absent and folder.finished(stage, key):
        console.say(f"{TITLES[side]}: all {len(requests)} are there")
        return
    facts = _Facts(folder, side, requests)
    if absent:
        folder.forget(stage)  # its record of the images is about to be untrue
        with peak_memory(settings.device) as peak:
            pipeline = load()
            backbone = nn.ModuleList(settings.family.backbones_of(pipeline).values())

            def note(generated: Generated) -> None:
                peak.update()
                facts.add(generated, peak, kernels_used(backbone))

            make_images(pipeline, requests, images, settings, console, TITLES[side], note)
        console.say(f"{TITLES[side]}: peak memory {peak.in_words()}")
    folder.finish(stage, key, images=len(requests), **facts.measured())


@contextlib.contextmanager
def claim_images(folder: Path, requests: Sequence[ImageRequest], overwrite: bool) -> Iterator[int]:
    """Hold a folder of images alone; yields the number of our images in it that no request asks for.

    With `overwrite` those are removed first. Raises UserError for a folder with something else in the place of an image
    that is asked for: an image that is not ours, or, without `overwrite`, one of other settings.
    """
    everyone = processes.current()
    with contextlib.ExitStack() as held:
        everyone.on_main(lambda: held.enter_context(owned.claimed(folder)) and None)
        if not everyone.is_main:
            held.enter_context(owned.joined(folder))
        yield everyone.on_main(lambda: _place_of_images(folder, requests, overwrite))


def _place_of_images(folder: Path, requests: Sequence[ImageRequest], overwrite: bool) -> int:
    for request in requests:
        path = folder / request.name
        key = read_key(path) if os.path.lexists(path) else request.key
        if key is None and not owned.of(path).is_known(path):
            raise UserError(f"{path} is not of dmquant: choose another folder with --out, or move it")
        if key not in (None, request.key) and not overwrite:
            raise UserError(
                f"{path} is an image of another model, prompt, seed or setting: choose another folder with --out, or "
                "replace the images of dmquant in this one with --overwrite"
            )
    if overwrite:
        prune(folder, requests)
    names = {request.name for request in requests}
    return sum(path.name not in names and read_key(path) is not None for path in folder.glob("[0-9]*.png"))


def images_key(requests: Sequence[ImageRequest]) -> str:
    """Fingerprint of a set of images: the keys of its images stand for all that each depends on."""
    return fingerprint(images=[request.key for request in requests])


def _refuse_others(folder: Path, requests: Sequence[ImageRequest]) -> None:
    """UserError for an image that is not of the run: what is scored and shown is all that the folder holds."""
    names = {request.name for request in requests}
    pictures = (path for path in folder.glob("[!.]*") if path.is_file() and kind_of(path) == PNG)
    if others := sorted(path for path in pictures if path.name not in names):
        raise UserError(f"{others[0]} is not of this run, which scores all images of that folder: move it elsewhere")


class _Facts:
    """Notes of a run on the images of one side, which survive a stop: seconds, process, NaN, memory, kernels."""

    def __init__(self, folder: RunFolder, side: str, requests: Sequence[ImageRequest]):
        self.folder = folder
        self.seconds, self.not_finite, self.of_all = f"seconds_{side}", f"not_finite_{side}", f"measured_{side}"
        self.sessions = f"sessions_{side}"
        self._earlier = folder.record(f"images_{side}") or {}
        self._noted: set[str] = set()
        keys = {request.key for request in requests}
        for kind in (self.seconds, self.sessions, self.not_finite):
            known = folder.notes(kind)
            if not known.keys() <= keys:  # facts on images that nobody asks for any more
                folder.note(kind, {key: fact for key, fact in known.items() if key in keys})
        if folder.notes(self.of_all) and not folder.notes(self.seconds):  # of images that are no more
            folder.note(self.of_all, {})

    def add(self, generated: Generated, peak: PeakMemory, used: dict[str, int]) -> None:
        """Note all that is known of images that are about to be saved."""
        newest_first = reversed(generated.seconds.items())
        new = dict(itertools.takewhile(lambda item: item[0] not in self._noted, newest_first))
        self._noted |= new.keys()
        self.folder.add_notes(self.seconds, new)
        self.folder.add_notes(self.sessions, dict.fromkeys(new, SESSION))
        known = self.folder.notes(self.not_finite)
        bad = {key: key in generated.not_finite for key in new}
        if changed := {key: value for key, value in bad.items() if value != known.get(key, False)}:
            self.folder.add_notes(self.not_finite, changed)
        most = max(peak.bytes, self.folder.notes(self.of_all).get("peak_memory_bytes") or 0)
        measured = {"peak_memory_bytes": most, "peak_memory_of": peak.what, "kernels": used}
        if measured != self.folder.notes(self.of_all):
            self.folder.add_notes(self.of_all, measured)

    def measured(self) -> dict[str, Any]:
        """The facts for the record of the stage; versions up to 0.2 kept them in the record before."""
        noted, earlier = self.folder.notes(self.of_all), self._earlier
        not_finite = sum(self.folder.notes(self.not_finite).values()) if noted else earlier.get("not_finite")
        names = ("peak_memory_bytes", "peak_memory_of", "kernels")
        return {name: (noted or earlier).get(name) for name in names} | {"not_finite": not_finite}


def save_inputs(settings: Settings, folder: RunFolder) -> dict[str, Path]:
    """Write the images that went into the pipeline beside those it made, and remove those of earlier settings; the
    folder of each kind, by what it holds."""
    if settings.inputs is None:
        return {}
    found = {}
    for argument, kind in settings.inputs.kinds.items():
        found[INPUTS[kind]] = place = folder.images(kind)
        pictures = settings.inputs.of_prompts[argument]
        requests = image_requests(settings.prompts, settings.seed, "")
        prune(place, requests)
        for request, picture in zip(requests, pictures, strict=True):
            save_picture(picture, place / request.name)
    return found


def as_settings_say(pipeline: "DiffusionPipeline", settings: Settings) -> AbstractContextManager[None]:
    """The pipeline makes every image as it would alone, where the settings ask for it, until the block ends."""
    return deterministic(settings.prompted(pipeline)) if settings.deterministic else contextlib.nullcontext()


def make_images(
    pipeline: "DiffusionPipeline",
    requests: Sequence[ImageRequest],
    folder: Path,
    settings: Settings,
    console: Console,
    title: str,
    note: Callable[[Generated], None] = lambda generated: None,
) -> Generated:
    """Make the batches of images that `folder` lacks; `note` is called with all that was made before each is saved."""
    absent = unfinished_batches(folder, requests, settings.batch_size, settings.deterministic)
    kept, began = len(requests) - sum(map(len, absent)), time.perf_counter()
    with console.bar(title) as bar, as_settings_say(pipeline, settings):
        bar(kept, len(requests))

        def on_batch(generated: Generated) -> None:
            made = len(generated.seconds)
            bar(kept + made, len(requests), speed=f"{made / (time.perf_counter() - began):.2f} images/s")

        generated = generate(
            settings.prompted(pipeline),
            requests,
            folder,
            batch_size=settings.batch_size,
            call=settings.call,
            as_alone=settings.deterministic,
            before_saving=note,
            on_batch=on_batch,
        )
    seconds, made = time.perf_counter() - began, len(generated.seconds)
    there = f"; {kept} were there" if kept else ""
    console.say(f"{title}: {made} in {seconds:.1f} s, {made / seconds:.2f} images/s{there}")
    if generated.not_finite:
        console.say(
            f"warning: {len(generated.not_finite)} of them hold NaN or infinity, shown black; try another --dtype"
        )
    return generated
