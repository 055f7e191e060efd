"""The VAE of the embedded emoji models: 64x64 RGB to 8x8 latents of 16 channels."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from emoji_data import IMAGE_SIZE
from emoji_training import Training, cosine
from torch import Tensor

LATENT_CHANNELS = 16


def make_vae() -> AutoencoderKL:
    """64x64 RGB to 8x8 latents of 16 channels."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )
    # Starting at unit posterior noise, the decoder learns to ignore the latents before they carry anything.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -4.0)
    return vae


def pixel_loss(made: Tensor, real: Tensor) -> Tensor:
    return F.l1_loss(made, real) + 0.5 * F.mse_loss(made, real)


def coarse_loss(made: Tensor, real: Tensor) -> Tensor:
    return F.l1_loss(F.avg_pool2d(made, 4), F.avg_pool2d(real, 4))


def edge_loss(made: Tensor, real: Tensor) -> Tensor:
    """Of differences between neighbouring pixels: sharp outlines, and no blotches on flat areas."""
    return F.l1_loss(made.diff(dim=2), real.diff(dim=2)) + F.l1_loss(made.diff(dim=3), real.diff(dim=3))


def train_vae(images: Tensor, minutes: float, batch: int, folder: Path) -> tuple[AutoencoderKL, dict]:
    device = images.device
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.99))
    training = Training("vae", {"vae": vae}, [optimizer], minutes, 0.999, folder)

    def loss_of_batch() -> Tensor:
        x = images[torch.randint(0, len(images), (batch,)).to(device)]
        x = x.flip(3) if torch.rand(1) < 0.5 else x
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape).to(posterior.mean)
            y = vae.decode(posterior.mean + noise * posterior.std.clamp(max=1.0)).sample
        nats_per_latent = posterior.kl().float().mean() / posterior.mean[0].numel()
        y = y.float()
        return pixel_loss(y, x) + 0.5 * coarse_loss(y, x) + 1e-3 * nats_per_latent

    training.run(loss_of_batch, cosine)
    return vae, training.facts()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every image's posterior."""
    posteriors = [vae.encode(part).latent_dist for part in images.split(64)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, means: Tensor, images: Tensor) -> float:
    """In dB, of the mean squared error over all images."""
    pairs = zip(means.split(64), images.split(64), strict=True)
    error = sum(F.mse_loss(vae.decode(z).sample.clamp(-1, 1), x, reduction="sum") for z, x in pairs)
    return 10 * math.log10(4 * images.numel() / error.item())


def refine_decoder(
    vae: AutoencoderKL, means: Tensor, deviations: Tensor, images: Tensor, minutes: float, batch: int, folder: Path
) -> dict:
    """Train the decoder alone on the finished encoder's latents: two thirds of the work, and the latents stay."""
    device = images.device
    modules = {"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.99))
    training = Training("decoder", modules, [optimizer], minutes, 0.999, folder)

    def loss_of_batch() -> Tensor:
        index = torch.randint(0, len(images), (batch,)).to(device)
        noise = torch.randn(batch, *means.shape[1:]).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            y = vae.decode(means[index] + noise * deviations[index]).sample
        y, x = y.float(), images[index]
        return pixel_loss(y, x) + edge_loss(y, x)

    training.run(loss_of_batch, cosine)
    return training.facts()
