"""Train `emoji-clip`: a small open_clip dual encoder that says how well a 64x64 picture shows an emoji's caption.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/train_emoji_clip.py --data package --out build/emoji-clip \\
        --vae pipelines/assets/emoji-pixart/vae --minutes 41

Contrastive (CLIP, Radford et al. 2103.00020), on the images that the embedded pipelines are trained on. A picture is a
real image, or its reconstruction by the VAE with a little latent noise, most of them moved, zoomed and turned by a
little; a caption is told whole or in part. For the first part of the budget half of the patches are left out (FLIP,
Li et al. 2212.00794), which halves the cost of a step.

Runs on CPU and CUDA, in bfloat16 autocast. The learning rate follows the share of the budget spent, so any budget
ends annealed. A checkpoint is written every minute to OUT/checkpoint, and the same command resumes from it; with a
smaller budget than was spent it packages what is there. The result is OUT/model, in float16, for open_clip:

    open_clip.create_model_and_transforms("local-dir:OUT/model"); open_clip.get_tokenizer("local-dir:OUT/model")
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

import emoji_clip
from diffusers import AutoencoderKL
from emoji_data import TEXT_LENGTH, load_emoji, make_tokenizer
from emoji_training import Training, cosine
from open_clip.model import CLIP
from open_clip.transformer import PatchDropout

RECONSTRUCTIONS = 2
WHOLE_CAPTIONS = 0.5
UNKNOWN_PIECES = 0.1
MASKED_PATCHES, MASKED_SHARE_OF_BUDGET = 0.5, 0.6
LARGEST_LOGIT_SCALE = 100


def train(
    model: CLIP, pictures: Tensor, tokens: Tensor, unknown: int, minutes: float, batch: int, folder: Path
) -> dict[str, float]:
    """`pictures` (versions, N, 3, 64, 64) in [-1, 1]; `tokens` (forms, N, 24), the whole caption first."""
    device, (versions, count) = pictures.device, pictures.shape[:2]
    chosen = {id(parameter) for parameter in emoji_clip.matrices(model)}
    optimizers = [
        torch.optim.Muon(emoji_clip.matrices(model), lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in model.parameters() if id(p) not in chosen], lr=1e-3, weight_decay=0.0),
    ]
    training = Training("clip", {"clip": model}, optimizers, minutes, 0.995, folder)
    model.visual.patch_dropout = masking = PatchDropout(MASKED_PATCHES)
    same = torch.arange(min(batch, count), device=device)

    def loss_of_batch() -> Tensor:
        masking.prob = MASKED_PATCHES if training.seconds < MASKED_SHARE_OF_BUDGET * training.budget else 0.0
        index = torch.randperm(count)[:batch]
        version = torch.randint(0, versions, index.shape)
        form = torch.where(torch.rand(len(index)) < WHOLE_CAPTIONS, 0, torch.randint(1, len(tokens), index.shape))
        text = tokens[form.to(device), index.to(device)]
        lost = (torch.rand(text.shape) < UNKNOWN_PIECES).to(device) & (text > unknown)
        shown = emoji_clip.augment(pictures[version.to(device), index.to(device)])
        # The backward pass of the fused attention is the slower one on a CPU.
        with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image_features = model.encode_image(shown)
            text_features = model.encode_text(text.masked_fill(lost, unknown))
        scale = model.logit_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
        image_features, text_features = (F.normalize(f.float(), dim=1) for f in (image_features, text_features))
        logits = scale * image_features @ text_features.T
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2

    training.run(loss_of_batch, cosine)
    return training.facts() | {"batch": len(same)}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the model")
    parser.add_argument("--vae", type=Path, required=True, help="folder of the VAE to reconstruct images with")
    parser.add_argument("--minutes", type=float, default=41, help="the compute budget; default 41")
    parser.add_argument("--batch", type=int, default=256, help="captioned images a step; default 256")
    parser.add_argument("--width", type=int, default=emoji_clip.WIDTH, help="channels of the image tower; default 192")
    parser.add_argument("--depth", type=int, default=emoji_clip.DEPTH, help="its blocks; default 5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    if not (options.data / "emoji.json").exists():
        sys.exit(f"{options.data} is not the unpacked emoji-datasource-google package: it has no emoji.json")
    torch.manual_seed(options.seed)
    images, captions = load_emoji(options.data)
    images = images.to(options.device)
    vae = AutoencoderKL.from_pretrained(options.vae, dtype=torch.float32).to(options.device)
    reconstructions = [emoji_clip.reconstruct(vae, images) for _ in range(RECONSTRUCTIONS)]
    tokenizer = make_tokenizer(captions)
    forms = zip(*map(emoji_clip.caption_forms, captions), strict=True)
    padded = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    tokens = torch.stack([tokenizer(list(form), **padded).input_ids for form in forms]).to(options.device)
    config = emoji_clip.make_config(tokenizer, options.width, options.depth)
    model = CLIP(**config).to(options.device).train()
    trained = train(
        model,
        torch.stack([images, *reconstructions]),
        tokens,
        tokenizer.unk_token_id,
        options.minutes,
        options.batch,
        options.out / "checkpoint",
    )
    emoji_clip.write_folder(model, config, tokenizer, options.out / "model")
    facts = {
        "model": "clip",
        "seed": options.seed,
        "device": options.device,
        "torch": torch.__version__,
        "images": len(images),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "width": options.width,
        "depth": options.depth,
        "clip": trained,
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
