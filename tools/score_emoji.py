"""How recognisable are the pictures of an embedded emoji model? Writes OUT/score.json and OUT/pictures.png.

    python tools/score_emoji.py --data package --pipeline pipelines/assets/emoji-pixart --out build/emoji-score
    python tools/score_emoji.py --data package --pipeline pipelines/assets/emoji-sd --out build/emoji-sd-score

Generates a seeded choice of training captions and counts how often the caption's own image is the nearest of all
training images, by Euclidean distance of Inception-v3 pool features. The same count for the same images after the
VAE's encoder and decoder is the ceiling: what a perfect denoiser could reach.
"""

import argparse
import hashlib
import inspect
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from emoji_data import IMAGE_SIZE, TEXT_LENGTH, load_emoji

from dmquant.evaluation.networks.features import FeatureStore
from dmquant.evaluation.networks.inception import Inception

COMPOSITIONS = (
    "blue apple, food & drink, food fruit",
    "red heart with wings, smileys & emotion, heart",
    "purple book, objects, book paper",
    "green car, travel & places, transport ground",
    "crying pumpkin, smileys & emotion, face costume",
    "pink cat, animals & nature, animal mammal",
    "yellow umbrella, travel & places, sky & weather",
    "black star in a circle, symbols, geometric",
    "robot with sunglasses, smileys & emotion, face glasses",
    "orange fish, animals & nature, animal marine",
    "fire fox, animals & nature, animal mammal",
    "white flower with sun, animals & nature, plant flower",
)
BATCH = 20
PIXART_CALL = {"max_sequence_length": TEXT_LENGTH, "clean_caption": False, "use_resolution_binning": False}


def generate(pipeline, captions: list[str], seeds: list[int], steps: int, guidance: float) -> list[Image.Image]:
    """One image for each caption, from initial noise of its own seed."""
    parameters = inspect.signature(pipeline.__call__).parameters
    more = {name: value for name, value in PIXART_CALL.items() if name in parameters}
    images = []
    for start in range(0, len(captions), BATCH):
        images += pipeline(
            prompt=captions[start : start + BATCH],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + BATCH]],
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            **more,
        ).images
    return images


@torch.inference_mode()
def reconstruct(pipeline, images: Tensor) -> Tensor:
    """`images` (N, 3, 64, 64) in [-1, 1] through the VAE's encoder (posterior mean) and decoder."""
    parts = images.to(pipeline.device).split(BATCH)
    return torch.cat([pipeline.vae.decode(pipeline.vae.encode(part).latent_dist.mean).sample for part in parts]).cpu()


def to_pil(images: Tensor) -> list[Image.Image]:
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


def save(images: list[Image.Image], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    return paths


def reference_features(inception: Inception, images: Tensor, out: Path) -> Tensor:
    """Features of every training image, computed once and kept in OUT/reference.pt."""
    file = out / "reference.pt"
    key = hashlib.sha256(images.numpy().tobytes()).hexdigest() + inception.backbone.sha256
    if file.exists() and (cached := torch.load(file, weights_only=True))["key"] == key:
        return cached["features"]
    features = FeatureStore().images(inception, save(to_pil(images), out / "real"))
    torch.save({"key": key, "features": features}, file)
    return features


def hit_rates(features: Tensor, reference: Tensor, own: Tensor) -> dict[str, float]:
    """Shares of rows of `features` whose own reference image, at index `own`, is the nearest, or among the five."""
    nearest = torch.cdist(features, reference, compute_mode="donot_use_mm_for_euclid_dist").topk(5, largest=False)
    hits = nearest.indices == own[:, None]
    return {"top1": hits[:, 0].sum().item() / len(own), "top5": hits.any(1).sum().item() / len(own)}


def draw(rows: list[list[Image.Image]], scale: int = 2) -> Image.Image:
    """Rows of images as one picture, each image enlarged `scale` times."""
    cell = IMAGE_SIZE * scale
    picture = Image.new("RGB", (cell * max(map(len, rows)), cell * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (x * cell, y * cell))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--pipeline", type=Path, required=True, help="the folder of the pipeline to score")
    parser.add_argument("--out", type=Path, required=True, help="folder for score.json, pictures.png and the images")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of captions and of the initial noise")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    logging.set_verbosity_error()  # or every caption cut at 24 tokens is named
    options.out.mkdir(parents=True, exist_ok=True)
    images, captions = load_emoji(options.data)
    own = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))[: options.captions]
    prompts = [captions[index] for index in own.tolist()]
    pipeline = DiffusionPipeline.from_pretrained(options.pipeline, dtype=torch.float32).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [options.seed + index for index in own.tolist()]
    generated = generate(pipeline, prompts, seeds, options.steps, options.guidance)
    unseen = generate(pipeline, list(COMPOSITIONS), list(range(len(COMPOSITIONS))), options.steps, options.guidance)
    reconstructed = reconstruct(pipeline, images[own])

    real = to_pil(images[own])
    shown = len(COMPOSITIONS)
    rows = [part for i in (0, shown) for part in (generated[i : i + shown], real[i : i + shown])]
    draw([*rows, unseen]).save(options.out / "pictures.png", optimize=True)

    inception = Inception.load(options.device)
    reference = reference_features(inception, images, options.out)
    store = FeatureStore()
    generated_features = store.images(inception, save(generated, options.out / "generated"))
    ceiling_features = store.images(inception, save(to_pil(reconstructed), options.out / "reconstructed"))
    psnr = 10 * torch.log10(4 / (reconstructed.clamp(-1, 1) - images[own]).square().mean())
    score = {
        "captions": len(prompts),
        "training_images": len(images),
        "steps": options.steps,
        "guidance": options.guidance,
        "seed": options.seed,
        "generated": hit_rates(generated_features, reference, own),
        "vae_ceiling": hit_rates(ceiling_features, reference, own),
        "vae_psnr_db": round(psnr.item(), 2),
        "inception": {"name": inception.backbone.name, "sha256": inception.backbone.sha256},
    }
    (options.out / "score.json").write_text(json.dumps(score, indent=2) + "\n")
    print(json.dumps(score, indent=2))


if __name__ == "__main__":
    main()
