"""The metrics: every one a function from `Inputs` to `Metric`, listed in `METRICS` under its name in report.json."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

from dmquant.errors import UserError, unknown
from dmquant.evaluation.generate import read_key
from dmquant.evaluation.images import ImagePairs, any_images, generated_images
from dmquant.evaluation.inception import Inception, InceptionUnavailableError
from dmquant.evaluation.latents import read_latent
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.result import Metric

PSNR_CAP = 100.0  # dB, what a pair of identical images counts as; one 8-bit step in a 64x64 image is 89 dB
SSIM_WINDOW = 11  # pixels, a Gaussian of sigma 1.5 cut at 3.5 sigma
RESAMPLES = 2000


@dataclass
class Inputs:
    """What the metrics look at: the images scored, the full-precision ones and real ones, all as folders.

    `inception` may be shared between calls, so that no image is looked at twice; otherwise it is loaded when a
    metric first needs it.
    """

    images: Path
    reference: Path
    real: Path | None = None
    device: str = "cpu"
    progress: Progress = field(default=silent)
    inception: Inception | None = None

    @cached_property
    def pairs(self) -> ImagePairs:
        return ImagePairs.open(self.reference, self.images)

    @cached_property
    def extractor(self) -> Inception:
        return self.inception or Inception.load(self.device)


def psnr(inputs: Inputs) -> Metric:
    """Mean peak signal-to-noise ratio of the pairs in dB, each capped at 100 dB (identical images are infinite)."""
    values = torch.cat(
        [
            peak_signal_noise_ratio(image, reference, data_range=255.0, dim=(1, 2, 3), reduction="none")
            for image, reference in _float_pairs(inputs, "PSNR")
        ]
    ).cpu()
    identical = int(values.isinf().sum())
    note = f"{identical} of {len(values)} pairs are identical and count as {PSNR_CAP:.0f} dB" if identical else None
    return _mean(values.clamp(max=PSNR_CAP), note)


def ssim(inputs: Inputs) -> Metric:
    """Mean structural similarity of the pairs (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, RGB, 8 bits."""
    values = []
    for image, reference in _float_pairs(inputs, "SSIM"):
        if min(image.shape[-2:]) < SSIM_WINDOW:
            return Metric.not_computed(f"the images are smaller than the {SSIM_WINDOW}x{SSIM_WINDOW} window of SSIM")
        values.append(structural_similarity_index_measure(image, reference, data_range=255.0, reduction="none"))
    return _mean(torch.cat(values).cpu())


def latent_mse(inputs: Inputs) -> Metric:
    """Mean squared difference of the pairs' final latents, in the units of the sampler (before the VAE's scaling)."""
    values, absent = [], Counter()
    for done, paths in enumerate(inputs.pairs.paths, start=1):
        latents = [read_latent(path, read_key(path)) for path in paths]
        absent.update(path.parent for path, latent in zip(paths, latents, strict=True) if latent is None)
        if not absent:
            values.append(_squared_difference(*latents, *paths))
        inputs.progress("latents", done, len(inputs.pairs))
    if absent:
        folder, count = absent.most_common(1)[0]
        return Metric.not_computed(
            f"{count} of {len(inputs.pairs)} images in {folder.name} have no final latents beside them; a run with "
            "latent_mse named in --metrics makes those images again"
        )
    not_finite = sum(not math.isfinite(value) for value in values)
    if not_finite:
        return Metric.not_computed(f"{not_finite} of {len(values)} images have NaN or infinity in their final latents")
    return _mean(torch.tensor(values, dtype=torch.float64))


def fid_fp(inputs: Inputs) -> Metric:
    """Fréchet Inception distance (Heusel et al. 2017) between the images and the full-precision ones."""
    return _fid(inputs, generated_images(inputs.images), generated_images(inputs.reference))


def fid_real(inputs: Inputs) -> Metric:
    """Fréchet Inception distance between the images and real ones."""
    if inputs.real is None:
        return Metric.not_computed("no real images given: pass --real DIR")
    return _fid(inputs, generated_images(inputs.images), any_images(inputs.real))


METRICS: dict[str, Callable[[Inputs], Metric]] = {
    "psnr": psnr,
    "ssim": ssim,
    "latent_mse": latent_mse,
    "fid_fp": fid_fp,
    "fid_real": fid_real,
}
NOT_IMPLEMENTED = ("lpips", "kid_fp", "cmmd_fp", "clip_score", "hpsv2")
NAMES = (*METRICS, *NOT_IMPLEMENTED)
WITHOUT_REFERENCE = frozenset({"fid_real", "clip_score", "hpsv2"})  # these score full precision itself, too


def check_names(names: list[str]) -> None:
    """Raise UsageError, with the nearest name, unless every one of `names` is a metric."""
    for name in names:
        if name not in NAMES:
            raise unknown("metric", name, NAMES, f"the metrics are {', '.join(NAMES)}")


def compute(name: str, inputs: Inputs) -> Metric:
    """The metric `name` of `inputs`, or the reason why it is not computed; raises UserError for unreadable images."""
    if name in NOT_IMPLEMENTED:
        return Metric.not_computed(f"{name} is not implemented in this version of dmquant")
    try:
        return METRICS[name](inputs)
    except InceptionUnavailableError as missing:
        return Metric.not_computed(str(missing))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets [N, D] and [M, D]; N and M at least 2."""
    distance = FrechetInceptionDistance(feature=_Given(a.shape[1]))
    distance.update(b.double(), real=True)
    distance.update(a.double(), real=False)
    return max(float(distance.compute()), 0.0)  # rounding leaves about -1e-8 between identical sets


def bootstrap_interval(values: Tensor, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` [N] (Efron 1979), over 2000 seeded resamples."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    means = torch.stack([values[torch.randint(n, (n,), generator=generator)].mean() for _ in range(RESAMPLES)])
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype)).tolist()
    return low, high


class _Given(nn.Identity):
    """Lets torchmetrics accumulate features that are computed already, once for several distances."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _float_pairs(inputs: Inputs, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (image, reference) as float64 [1, 3, H, W] in 0..255: in float32 SSIM of equal images is not exactly 1."""
    for done, (reference, image) in enumerate(inputs.pairs, start=1):
        yield tuple(x[None].to(inputs.device, torch.float64) for x in (image, reference))
        inputs.progress(what, done, len(inputs.pairs))


def _squared_difference(reference: Tensor, latent: Tensor, reference_path: Path, path: Path) -> float:
    if latent.shape != reference.shape:
        raise UserError(f"the final latents of {path} and {reference_path} differ in size: generate both at one size")
    return float((latent.double() - reference.double()).square().mean())


def _mean(values: Tensor, note: str | None = None) -> Metric:
    low, high = bootstrap_interval(values) if len(values) > 1 else (None, None)
    return Metric(float(values.mean()), low, high, images=len(values), note=note)


def _fid(inputs: Inputs, images: list[Path], others: list[Path]) -> Metric:
    if min(len(images), len(others)) < 2:
        return Metric.not_computed("FID needs at least 2 images on each side")
    a, b = (inputs.extractor.features(paths, inputs.progress) for paths in (images, others))
    return Metric(
        frechet_distance(a, b),
        images=len(images),
        backbone=inputs.extractor.backbone,
        note=_fid_note(len(images), len(others), a.shape[1]),
    )


def _fid_note(images: int, others: int, dimension: int) -> str:
    sizes = f"{images} against {others} images"
    if min(images, others) > dimension:
        return sizes
    return f"{sizes}: fewer than {dimension + 1}, so the covariance is rank-deficient; compare only at equal counts"
