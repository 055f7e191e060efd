"""PSNR, SSIM, MS-SSIM and LPIPS by several implementations; run by metric_peers.py."""

import contextlib
import io
from collections.abc import Callable, Iterator
from statistics import fmean

import numpy as np
import torch
from metric_peers import SIDE, Pairs, Row, each
from torch import Tensor, nn

from dmquant.evaluation import structural_similarity
from dmquant.evaluation.metrics.psnr import decibels
from dmquant.evaluation.networks.perceptual_distance import NETWORKS, load_lpips

MS_SSIM_TIMES = 3  # 192 pixels: five scales need 176


def psnr(*both: Pairs) -> Iterator[Row]:
    import piq
    from skimage.metrics import peak_signal_noise_ratio as skimage
    from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics

    def torchmetrics_of(pairs: Pairs, **options) -> float:
        return float(torchmetrics(pairs.images.double(), pairs.references.double(), data_range=255.0, **options))

    yield Row("**dmquant**: mean of the pairs' dB, of 8 bits", each(both, lambda p: decibels(*sides(p)).mean()))
    yield Row(
        "scikit-image, `data_range=255`",
        each(both, lambda p: fmean(float(skimage(b, a, data_range=255)) for a, b in p.arrays)),
        "nothing",
    )
    yield Row(
        "torchmetrics, `dim=(1, 2, 3)`",
        each(both, lambda p: torchmetrics_of(p, dim=(1, 2, 3), reduction="elementwise_mean")),
        "nothing",
    )
    yield Row("torchmetrics, default", each(both, torchmetrics_of), "dB of the mean squared error of all pairs")
    yield Row("piq", each(both, lambda p: piq.psnr(*p.unit)), "1e-8 added to the error: at most 80 dB")
    yield Row(
        "piq, `convert_to_greyscale=True`",
        each(both, lambda p: piq.psnr(*p.unit, convert_to_greyscale=True)),
        "luminance alone",
    )
    equal = both[0].references
    same = Pairs(equal, equal)
    yield Row("equal images: dmquant, scikit-image, torchmetrics", ("100; inf; inf",), "capped in the mean")
    yield Row("equal images: piq", (float(piq.psnr(*same.unit)),))


def ssim(*both: Pairs) -> Iterator[Row]:
    import piq
    import pytorch_msssim
    from skimage.metrics import structural_similarity as skimage
    from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics

    def skimage_of(pairs: Pairs, **options) -> float:
        return fmean(float(skimage(b, a, data_range=255, channel_axis=2, **options)) for a, b in pairs.arrays)

    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    yield Row("**dmquant**", each(both, lambda p: structural_similarity.ssim(*sides(p)).mean()))
    yield Row("torchmetrics", each(both, lambda p: torchmetrics(*p.unit, data_range=1.0)), "nothing")
    border = "the 5 pixels at each border, where the window overhangs, do not count"
    yield Row(
        "scikit-image, `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`",
        each(both, lambda p: skimage_of(p, **gaussian)),
        border,
    )
    yield Row(
        "pytorch-msssim",
        each(both, lambda p: pytorch_msssim.ssim(*p.unit, data_range=1.0)),
        border,
    )
    yield Row("piq", each(both, lambda p: piq.ssim(*p.unit)), f"{border}; images from 384 pixels on are shrunk")
    yield Row(
        "scikit-image, default",
        each(both, skimage_of),
        "7x7 window of equal weights, sample covariance; 3 pixels at each border do not count",
    )
    yield Row(
        "scikit-image, the same on luminance: Wang et al.'s own code",
        each(both, lambda p: fmean(float(skimage(*map(grey, pair), data_range=255, **gaussian)) for pair in p.arrays)),
        f"luminance alone; {border}",
    )


def ms_ssim(*both: Pairs) -> Iterator[Row]:
    import piq
    import pytorch_msssim
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as torchmetrics

    large = [pairs.enlarged(MS_SSIM_TIMES) for pairs in both]

    def by(measure: Callable[..., Tensor]) -> tuple[float, ...]:
        """A pair at a time, in float32: torchmetrics takes gigabytes for a batch."""
        images = [zip(*(side.float().split(1) for side in p.unit), strict=True) for p in large]
        return tuple(fmean(float(measure(*pair, data_range=1.0)) for pair in pairs) for pairs in images)

    size = SIDE * MS_SSIM_TIMES
    border = "the border does not count at the last scale either; channels are averaged last"
    own = each(large, lambda p: structural_similarity.ms_ssim(*sides(p)).mean())
    yield Row(f"**dmquant**, pairs enlarged to {size} pixels", own)
    yield Row("torchmetrics", by(torchmetrics), "nothing")
    yield Row("pytorch-msssim", by(pytorch_msssim.ms_ssim), border)
    yield Row("piq", by(piq.multi_scale_ssim), border)


def lpips(*both: Pairs) -> Iterator[Row]:
    import lpips as authors
    import piq
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import vgg16

    for name, network in NETWORKS.items():
        ours = load_lpips(name)
        heads = "the heads of the first release, which did not normalize images"

        def made(build: Callable[..., nn.Module], trunk: nn.Module = ours, net: str = name, **options) -> nn.Module:
            """A peer with our convolutions, where it would download the same."""
            with contextlib.redirect_stdout(io.StringIO()):
                model = build(net=net, pnet_rand=True, **options)
            return filled(model, trunk)

        yield Row(f"**dmquant**, {network.name}", each(both, lambda p, net=ours: net(*sides(p)).mean()))
        newest, first = made(authors.LPIPS), made(authors.LPIPS, version="0.0")
        yield Row(f"lpips 0.1.4, {network.name}", each(both, through(newest)), "nothing")
        yield Row(f'lpips 0.1.4, {network.name}, `version="0.0"`', each(both, through(first)), heads)
        unchanged = through(newest, lambda x: x)
        yield Row(
            f"lpips 0.1.4, {network.name}, images in 0..1",
            each(both, unchanged),
            "a mistake: such images need `normalize=True`",
        )
        yield Row(f"torchmetrics, {network.name}", each(both, through(made(_LPIPS))), "nothing")
    stages = [piq.perceptual.VGG16_LAYERS[f"relu{stage}"] for stage in ("1_2", "2_2", "3_3", "4_3", "5_3")]
    features = filled(vgg16(weights=None).features, ours)
    weights = [head.detach() for head in ours.heads]
    theirs = piq.ContentLoss(features, stages, weights, normalize_features=True)  # what piq.LPIPS would download
    yield Row(
        "piq, VGG16",
        each(both, through(theirs, lambda x: x)),
        "nothing",
    )


def filled(model: nn.Module, trunk: nn.Module) -> nn.Module:
    """`model` with the convolutions of `trunk` in its own, heads left as they are."""

    def convolutions(part: nn.Module) -> list[nn.Conv2d]:
        return [module for module in part.modules() if isinstance(module, nn.Conv2d) and module.out_channels > 1]

    for one, other in zip(convolutions(model), convolutions(trunk), strict=True):
        one.load_state_dict(other.state_dict())
    return model.eval()


def through(model: nn.Module, scaled: Callable[[Tensor], Tensor] = lambda x: 2 * x - 1) -> Callable[[Pairs], Tensor]:
    """The mean distance that `model` gives pairs."""

    def value(pairs: Pairs) -> Tensor:
        with torch.inference_mode():
            return model(*(scaled(side.float()) for side in pairs.unit)).mean()

    return value


def sides(pairs: Pairs) -> tuple[Tensor, Tensor]:
    return pairs.images, pairs.references


def grey(image: np.ndarray) -> np.ndarray:
    """Luminance [H, W] as MATLAB's rgb2gray rounds it, of an image [H, W, 3]; both of 8 bits."""
    return (image @ np.array([0.298936, 0.587043, 0.114021])).round().astype(np.uint8)


METRICS = {"psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim, "lpips": lpips}
