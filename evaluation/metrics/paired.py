"""Metrics of pairs: every image against the full-precision one of the same prompt, seed and initial noise."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.evaluation import ssim as similarity
from dmquant.evaluation.generate import read_key
from dmquant.evaluation.images import ImagePairs
from dmquant.evaluation.latents import read_latent
from dmquant.evaluation.metrics.inputs import Inputs
from dmquant.evaluation.metrics.summary import summarize
from dmquant.evaluation.result import Metric
from dmquant.host import processes

PSNR_CAP = 100.0  # dB, what a pair of identical images counts as; one 8-bit step in a 64x64 image is 89 dB
PIXELS_PER_BATCH = 512 * 512
READERS = 4  # threads that read the batches to come
NAMES_SHOWN = 3

Item, Result = TypeVar("Item"), TypeVar("Result")


def psnr(inputs: Inputs) -> Metric:
    """Mean peak signal-to-noise ratio of the pairs in dB, each capped at 100 dB (identical images are infinite)."""
    scored = _score(inputs, "PSNR", _psnr)
    identical = int(scored.values.isinf().sum())
    capped = f"{identical} of {len(scored.values)} pairs are identical and count as {PSNR_CAP:.0f} dB"
    notes = (capped if identical else None, scored.note)
    return summarize(
        scored.values.clamp(max=PSNR_CAP), higher_is_better=True, note="; ".join(filter(None, notes)) or None
    )


def ssim(inputs: Inputs) -> Metric:
    """Mean structural similarity of the pairs (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, RGB, 8 bits."""
    if reason := _too_small(inputs, similarity.WINDOW, "the window of SSIM needs"):
        return Metric.not_computed(reason)
    scored = _score(inputs, "SSIM", similarity.ssim)
    return summarize(scored.values, higher_is_better=True, note=scored.note)


def ms_ssim(inputs: Inputs) -> Metric:
    """Mean multi-scale structural similarity of the pairs (Wang et al. 2003), over the five scales of the paper."""
    if reason := _too_small(inputs, similarity.MULTI_SCALE_SIDE, "five scales need"):
        return Metric.not_computed(reason)
    scored = _score(inputs, "MS-SSIM", similarity.ms_ssim)
    return summarize(scored.values, higher_is_better=True, note=scored.note)


def lpips(inputs: Inputs) -> Metric:
    """Mean LPIPS of the pairs (Zhang et al. 2018, version 0.1) through AlexNet."""
    return _lpips(inputs, "alex")


def lpips_vgg(inputs: Inputs) -> Metric:
    """Mean LPIPS of the pairs (Zhang et al. 2018, version 0.1) through VGG16."""
    return _lpips(inputs, "vgg")


def latent_mse(inputs: Inputs) -> Metric:
    """Mean squared difference of the pairs' final latents, in the units of the sampler (before the VAE's scaling)."""

    def differences(pairs: Sequence[tuple[Path, Path]]) -> Iterator[float | list[Path]]:
        for done, paths in enumerate(pairs, start=1):
            yield _latent_difference(*paths)
            inputs.progress("latents", done, len(pairs))

    found = _in_shares(list(inputs.pairs.paths), differences)
    absent = Counter(path.parent for lacking in found if isinstance(lacking, list) for path in lacking)
    if absent:
        folder, count = absent.most_common(1)[0]
        return Metric.not_computed(
            f"{count} of {len(found)} images in {folder.name} have no final latents beside them; a run with "
            "latent_mse named in --metrics makes those images again"
        )
    values = torch.tensor(found, dtype=torch.float64)
    if not values.isfinite().all():
        names = _names(inputs.pairs, (~values.isfinite()).tolist())
        return Metric.not_computed(f"{names} have NaN or infinity in their final latents")
    return summarize(values, higher_is_better=False)


@dataclass(frozen=True)
class _Scored:
    """One value a pair [N], float64 on the CPU, in the order of the file names; and what is odd about the images."""

    values: Tensor
    note: str | None


def _score(inputs: Inputs, what: str, measure: Callable[[Tensor, Tensor], Tensor]) -> _Scored:
    """`measure` of every pair: from images and references, both uint8 [N, 3, H, W], to [N]."""
    pairs, device = inputs.pairs, inputs.networks.device

    def measured(batches: Sequence[range]) -> Iterator[list[tuple[float, bool]]]:
        done, total = 0, sum(map(len, batches))
        for reference, image in _read_ahead(pairs, batches):
            values = measure(image.to(device), reference.to(device))
            yield list(zip(values.tolist(), _one_colour(image), strict=True))
            done += len(image)
            inputs.progress(what, done, total)

    found = [pair for batch in _in_shares(pairs.batches(PIXELS_PER_BATCH), measured) for pair in batch]
    values, blank = zip(*found, strict=True)
    note = f"{_names(pairs, blank)} hold one colour only, as NaN leaves them" if any(blank) else None
    return _Scored(torch.tensor(values, dtype=torch.float64), note)


def _in_shares(items: Sequence[Item], work: Callable[[Sequence[Item]], Iterable[Result]]) -> list[Result]:
    """The results of `work`, one an item and in their order; each of several processes does its share of the items."""
    ours = processes.current()
    shares = ours.together(lambda: list(work(ours.share(items))))
    return [shares[index % ours.count][index // ours.count] for index in range(len(items))]


def _read_ahead(pairs: ImagePairs, batches: Iterable[range]) -> Iterator[tuple[Tensor, Tensor]]:
    """References and images of every batch, read while those before are in use."""
    waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for batch in batches:
            waiting.append(pool.submit(pairs.load, batch))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _psnr(image: Tensor, reference: Tensor) -> Tensor:
    squared = (image.int() - reference.int()).square().flatten(1)
    mean = squared.sum(1).double() / squared.shape[1]  # integers are summed exactly
    return 10 * torch.log10(255.0**2 / mean)


def _lpips(inputs: Inputs, name: str) -> Metric:
    network = inputs.networks.lpips(name)
    if reason := _too_small(inputs, network.smallest, "its network needs"):
        return Metric.not_computed(reason)
    scored = _score(inputs, "LPIPS", network)
    return summarize(scored.values, higher_is_better=False, note=scored.note, backbone=network.backbone)


def _latent_difference(reference_path: Path, path: Path) -> float | list[Path]:
    """The mean squared difference, or which of the two have no latents."""
    reference, latent = (read_latent(file, read_key(file)) for file in (reference_path, path))
    if reference is None or latent is None:
        return [file for file, found in ((reference_path, reference), (path, latent)) if found is None]
    if latent.shape != reference.shape:
        raise UserError(f"the final latents of {path} and {reference_path} differ in size: generate both at one size")
    return float((latent.double() - reference.double()).square().mean())


def _too_small(inputs: Inputs, side: int, why: str) -> str | None:
    """The reason not to compute a metric that needs sides of `side` pixels, or None."""
    least = min(map(min, inputs.pairs.sizes))
    return f"images of {least} pixels are smaller than the {side}x{side} that {why}" if least < side else None


def _one_colour(images: Tensor) -> list[bool]:
    """Whether each of `images` [N, 3, H, W] is the same everywhere."""
    return (images.amax((2, 3)) == images.amin((2, 3))).all(1).tolist()


def _names(pairs: ImagePairs, flags: Sequence[bool]) -> str:
    """How many images are flagged and what the first are called, as in "2 of 64 images (00003.png, 00041.png)"."""
    names = [path.name for path, flag in zip(pairs.quantized, flags, strict=True) if flag]
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return f"{len(names)} of {len(flags)} images ({shown})"
