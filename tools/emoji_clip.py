"""The parts of `emoji-clip`: its architecture, the captions and pictures it learns from, its folder for open_clip."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from emoji_data import IMAGE_SIZE, TEXT_LENGTH
from emoji_vae import encode
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WIDTH, DEPTH, HEAD_WIDTH = 192, 5, 64
TEXT_WIDTH, TEXT_DEPTH, TEXT_HEADS = 160, 2, 5
EMBEDDING = 128
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}

WHITE = 1.0
LARGEST_ZOOM, LARGEST_SHIFT, LARGEST_TURN = 0.1, 0.08, 0.1  # share of the size, share of half the width, radians
SHARE_MOVED = 0.75  # the others are not resampled, or the model would like slight blur better than none
LARGEST_NOISE = 0.05  # standard deviation, of the range [-1, 1]
LARGEST_LATENT_NOISE = 0.3  # of the latents' own standard deviation


def make_config(tokenizer: PreTrainedTokenizerFast, width: int = WIDTH, depth: int = DEPTH) -> dict:
    """open_clip's model configuration: a vision transformer on 8x8 patches, and a causal text transformer."""
    return {
        "embed_dim": EMBEDDING,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "width": width,
            "layers": depth,
            "head_width": HEAD_WIDTH,
            "pool_type": "avg",
        },
        "text_cfg": {
            "context_length": TEXT_LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "emoji-clip",  # of a local folder, open_clip reads the tokenizer that lies in it
            "width": TEXT_WIDTH,
            "heads": TEXT_HEADS,
            "layers": TEXT_DEPTH,
            "pool_type": "eos",
            "eos_id": tokenizer.eos_token_id,
            "pad_id": tokenizer.pad_token_id,
        },
    }


def matrices(model: CLIP) -> list[torch.nn.Parameter]:
    """Weights of both transformers: what Muon is for."""
    blocks = [*model.visual.transformer.parameters(), *model.transformer.parameters()]
    return [parameter for parameter in blocks if parameter.ndim == 2]


def caption_forms(caption: str) -> list[str]:
    """What one caption may be told as: whole, without its category, without its subcategory, and the name alone."""
    name, category, group = caption.rsplit(", ", 2)
    return [caption, f"{name}, {group}", f"{name}, {category}", name]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """`images` (N, 3, 64, 64) in [-1, 1] through the VAE, each with latent noise of its own random strength."""
    latents, _ = encode(vae, images)
    strength = LARGEST_LATENT_NOISE * latents.std() * torch.rand(len(images), 1, 1, 1).to(latents)
    noisy = latents + strength * torch.randn(latents.shape).to(latents)
    return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in noisy.split(64)])


def augment(images: Tensor) -> Tensor:
    """Most images a little moved, zoomed and turned on white, half of all a little noisy; no flip, hue or blur."""
    count, device = len(images), images.device
    zoom, turn, across, down = (torch.rand(count) < SHARE_MOVED) * (2 * torch.rand(4, count) - 1)
    size, turn = 1 + LARGEST_ZOOM * zoom, LARGEST_TURN * turn
    rows = [
        torch.stack([size * turn.cos(), -size * turn.sin(), LARGEST_SHIFT * across], 1),
        torch.stack([size * turn.sin(), size * turn.cos(), LARGEST_SHIFT * down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).to(device), list(images.shape), align_corners=False)
    moved = WHITE + F.grid_sample(images - WHITE, grid, mode="bicubic", align_corners=False)
    strength = LARGEST_NOISE * (2 * torch.rand(count, 1, 1, 1) - 1).clamp(min=0)
    return (moved + (strength * torch.randn(images.shape)).to(device)).clamp(-1, 1)


def write_folder(model: CLIP, config: dict, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """What open_clip loads as `local-dir:FOLDER`: configuration, float16 weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    # transformers 5 writes its own class name, which transformers 4 does not know; both read the older one.
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
