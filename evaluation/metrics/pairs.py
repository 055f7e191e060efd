"""Metrics of pairs: every image against the full-precision one of the same prompt, seed and noise."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dmquant.evaluation.images import ImagePairs
from dmquant.evaluation.metrics.kind import Kind
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.metrics.summary import summarize
from dmquant.evaluation.read_ahead import READERS, read_ahead
from dmquant.evaluation.result import Backbone, Metric
from dmquant.host import processes

PIXELS_PER_BATCH = 512 * 512
NAMES_SHOWN = 3

Item, Result = TypeVar("Item"), TypeVar("Result")
Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PairValues:
    """Values of pairs [N], float64 on the CPU, in the order of the file names; and remarks on odd images.

    That of a pair of videos is the mean over its frames.
    """

    values: Tensor
    note: str | None


def mean_of_pairs(
    scored: ScoredImages,
    kind: Kind,
    measure: Measure,
    *,
    least_side: int = 1,
    why: str = "",
    backbone: Backbone | None = None,
) -> Metric:
    """The mean of `values_of_pairs`, summarized; not computed where an image has a side below `least_side` pixels."""
    least = min(map(min, scored.pairs.sizes))
    if least < least_side:
        return Metric.not_computed(
            f"images of {least} pixels are smaller than the {least_side}x{least_side} that {why}"
        )
    of_pairs = values_of_pairs(scored, kind, measure)
    return summarize(of_pairs.values, kind.better, of_pairs.note, backbone)


def values_of_pairs(scored: ScoredImages, kind: Kind, measure: Measure, most: float = math.inf) -> PairValues:
    """`measure` of every pair; the title of `kind` names it in the progress bar.

    Args:
        measure: from images and references, both uint8 [N, 3, H, W] on the networks' device, to [N].
        most: what a frame of a video counts as at most, unless all are infinite.
    """
    pairs, device = scored.pairs, scored.networks.device

    def measured(batches: Sequence[range]) -> Iterator[list[tuple[float, bool]]]:
        done, total = 0, sum(map(len, batches))
        with ThreadPoolExecutor(READERS) as pool:
            for loaded in read_ahead(batches, pairs.load, pool):
                if loaded[0][0].dim() == 3:
                    reference, image = map(torch.stack, zip(*loaded, strict=True))
                    values = measure(image.to(device), reference.to(device)).tolist()
                    blank = _one_colour(image)
                else:
                    values = [_mean_of_frames(*pair, measure, device, most) for pair in loaded]
                    blank = [all(_one_colour(video)) for _, video in loaded]
                yield list(zip(values, blank, strict=True))
                done += len(loaded)
                scored.progress(kind.title, done, total)

    found = [pair for batch in in_shares(pairs.batches(PIXELS_PER_BATCH), measured) for pair in batch]
    values, blank = zip(*found, strict=True)
    note = f"{flagged_names(pairs, blank)} hold one colour only, as NaN leaves them" if any(blank) else None
    return PairValues(torch.tensor(values, dtype=torch.float64), note)


def _mean_of_frames(reference: Tensor, video: Tensor, measure: Measure, device: str, most: float) -> float:
    """The mean of `measure` over the frames of two videos, uint8 [frames, 3, H, W], on some frames at a time."""
    at_once = max(1, PIXELS_PER_BATCH // math.prod(video.shape[2:]))
    parts = zip(video.split(at_once), reference.split(at_once), strict=True)
    values = torch.cat([measure(part.to(device), other.to(device)).double().cpu() for part, other in parts])
    return math.inf if bool((values == math.inf).all()) else values.clamp(max=most).mean().item()


def in_shares(items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]]) -> list[Result]:
    """The results of `work`, one an item and in their order; each of several processes does its share of the items."""
    ours = processes.current()
    shares = ours.together(lambda: list(work(ours.share(items))))
    return [shares[index % ours.count][index // ours.count] for index in range(len(items))]


def flagged_names(pairs: ImagePairs, flags: Sequence[bool]) -> str:
    """The number of flagged images and the first names, as in "2 of 64 images (00003.png, 00041.png)"."""
    names = [path.name for path, flag in zip(pairs.quantized, flags, strict=True) if flag]
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} of {len(flags)} images ({shown})"


def _one_colour(images: Tensor) -> list[bool]:
    """Whether each of `images` [N, 3, H, W] is the same everywhere."""
    return (images.amax((2, 3)) == images.amin((2, 3))).all(1).tolist()
