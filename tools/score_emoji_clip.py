"""Does an emoji-clip tell whether a picture shows its caption? Writes OUT/score.json.

    python tools/score_emoji.py --data package --pipeline pipelines/assets/emoji-pixart --out build/emoji-score
    python tools/score_emoji_clip.py --data package --model pipelines/assets/emoji-clip --out build/emoji-clip-score \\
        --pictures build/emoji-score

The model is loaded through open_clip alone. For each kind of picture: how often a picture's own caption is the nearest
of all captions, by cosine of the embeddings, and among the nearest five; the mean cosine, times 100, with its own
caption and with another picture's; and how often its own is the higher of the two. `--pictures` names folders that
score_emoji.py wrote: what the pipeline generated, which no training has seen, and its VAE's reconstructions.

Damage: mean cosine, times 100, of 400 real images that are blurred (Gaussian, pixels), noisy (standard deviation, of
the range 0 to 1), or blended with another emoji (its share).
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

import open_clip
from emoji_clip import augment, caption_forms
from emoji_data import load_emoji
from score_emoji import hit_rates, to_pil

BATCH = 128
DAMAGED = 400
BLURS = (0.0, 0.5, 1.0, 2.0, 4.0)
NOISES = (0.0, 0.05, 0.1, 0.2, 0.4)
BLENDS = (0.0, 0.25, 0.5, 0.75, 1.0)


class Encoder:
    """The dual encoder of a folder, as open_clip loads it."""

    def __init__(self, folder: Path, device: str):
        self.device = device
        self.model, _, self.prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=device)
        self.tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval()

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """Normalised embeddings (N, D)."""
        batches = torch.stack([self.prepare(image) for image in images]).to(self.device).split(BATCH)
        return torch.cat([self.model.encode_image(batch, normalize=True) for batch in batches]).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Normalised embeddings (N, D)."""
        batches = self.tokenize(texts).to(self.device).split(BATCH)
        return torch.cat([self.model.encode_text(batch, normalize=True) for batch in batches]).cpu()


def agreement(pictures: Tensor, texts: Tensor, own: Tensor) -> dict[str, float]:
    """Retrieval and cosines of embedded `pictures` against embedded `texts`; `own` holds each picture's caption."""
    right = (pictures * texts[own]).sum(1)
    wrong = (pictures * texts[own.roll(1)]).sum(1)
    return hit_rates(pictures, texts, own) | {
        "cosine": round(100 * right.mean().item(), 2),
        "cosine_of_another_caption": round(100 * wrong.mean().item(), 2),
        "own_above_another": (right > wrong).sum().item() / len(own),
    }


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels, the edge continued outwards."""
    reach = math.ceil(3 * sigma)
    offset = torch.arange(-reach, reach + 1)
    kernel = torch.softmax(-0.5 * (offset / max(sigma, 1e-3)) ** 2, dim=0)
    planes = F.pad(images, [reach] * 4, mode="replicate").flatten(0, 1)[:, None]
    planes = F.conv2d(F.conv2d(planes, kernel[None, None, None, :]), kernel[None, None, :, None])
    return planes.view(images.shape)


def falls(encoder: Encoder, texts: Tensor, images: Tensor, levels: tuple[float, ...], damage: Callable) -> dict:
    """Mean cosine, times 100, of each level of damage."""
    means = {}
    for level in levels:
        embedded = encoder.images(to_pil(damage(images, level).clamp(-1, 1)))
        means[str(level)] = round(100 * (embedded * texts).sum(1).mean().item(), 2)
    return means


def read(folder: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(folder.glob("*.png"))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--model", type=Path, required=True, help="the folder of the emoji-clip")
    parser.add_argument("--out", type=Path, required=True, help="folder for score.json")
    parser.add_argument("--pictures", type=Path, nargs="*", default=[], help="folders that score_emoji.py wrote")
    parser.add_argument("--seed", type=int, default=0, help="of augmentation, noise, and the other captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    images, captions = load_emoji(options.data)
    order = torch.randperm(len(images))  # so that the other picture is any, not the next of the same category
    encoder = Encoder(options.model, options.device)
    whole, *_, names = (encoder.texts(list(form)) for form in zip(*map(caption_forms, captions), strict=True))
    shuffled = images[order]
    real = encoder.images(to_pil(shuffled))
    pictures = {
        "real": agreement(real, whole, order),
        "real, name alone": agreement(real, names, order),
        "augmented": agreement(encoder.images(to_pil(augment(shuffled))), whole, order),
    }
    for folder in options.pictures:
        settings = json.loads((folder / "score.json").read_text())
        seeded = torch.Generator().manual_seed(settings["seed"])
        drawn = torch.randperm(len(images), generator=seeded)[: settings["captions"]]
        for kind in ("reconstructed", "generated"):
            made = encoder.images(read(folder / kind))
            pictures[f"{folder.name}: {kind}"] = agreement(made, whole, drawn)
    damaged, others, own = shuffled[:DAMAGED], shuffled.roll(1, 0)[:DAMAGED], whole[order[:DAMAGED]]
    score = {
        "model": options.model.name,
        "captions": len(captions),
        "seed": options.seed,
        "pictures": pictures,
        "blur": falls(encoder, own, damaged, BLURS, blur),
        "noise": falls(encoder, own, damaged, NOISES, lambda x, s: x + 2 * s * torch.randn(x.shape)),
        "blend": falls(encoder, own, damaged, BLENDS, lambda x, share: torch.lerp(x, others, share)),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "score.json").write_text(json.dumps(score, indent=2) + "\n")
    print(json.dumps(score, indent=2))


if __name__ == "__main__":
    main()
