"""What scoring costs beyond its networks: seconds an image, against the same batches given to the network alone.

    python benchmarks/scoring.py [--images 64] [--side 512] [--networks inception,ViT-B-32]

Scoring reads, hashes, decodes, resizes and batches the PNG files and keeps the features; the network alone is given
batches that are prepared already. The two alternate. CLIP models are built with random weights: their time does not
depend on them. One row of a markdown table a network.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report_page import picture

from dmquant.evaluation.images import generated_images, open_rgb, save_image
from dmquant.evaluation.networks.clip import ClipModel, open_clip
from dmquant.evaluation.networks.features import FeatureStore, ImageNetwork
from dmquant.evaluation.networks.inception import Inception
from dmquant.evaluation.result import Backbone


def clip_of_random_weights(name: str, device: str) -> ClipModel:
    """An architecture of open_clip with the preparation that is its own."""
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=None)
    backbone = Backbone(f"{name}, random weights", "0" * 64)
    return ClipModel(model, lambda path: transform(open_rgb(path)), open_clip.get_tokenizer(name), backbone, "", device)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(network: ImageNetwork, paths: list[Path], repeats: int) -> tuple[float, float]:
    """Seconds an image of scoring and of the network alone, medians."""
    batches = torch.stack([network.prepare(path) for path in paths]).split(network.batch_size)
    network(batches[0])  # the first call is slower

    def alone() -> None:
        for batch in batches:
            network(batch)

    scored, bare = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            scored.append(seconds(lambda folder=folder: FeatureStore(Path(folder)).images(network, paths)))
        bare.append(seconds(alone))
    return statistics.median(scored) / len(paths), statistics.median(bare) / len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--networks", default="inception,ViT-B-32", help="inception, or architectures of open_clip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print("| network | images | scoring, s an image | network alone | ratio |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.images):
            pixels = torch.from_numpy(picture(options.side, index)).clamp(0, 255).byte().permute(2, 0, 1)
            save_image(pixels, Path(folder, f"{index:05d}.png"))
        paths = generated_images(Path(folder))
        for name in options.networks.split(","):
            device = options.device
            network = Inception.load(device) if name == "inception" else clip_of_random_weights(name, device)
            scored, bare = measure(network, paths, options.repeats)
            sizes = f"{len(paths)} of {options.side}x{options.side}"
            row = (network.backbone.name, sizes, f"{scored:.3f}", f"{bare:.3f}", f"{scored / bare:.2f}")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
