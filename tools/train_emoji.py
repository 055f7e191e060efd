"""Train the embedded model `emoji-pixart`: a small PixArt-Sigma text-to-image pipeline on captioned emoji.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/train_emoji.py --data package --out build/emoji-pixart --minutes 120

Runs on CPU and CUDA, in bfloat16 autocast. The learning rate follows the share of the budget spent, so any budget
ends annealed. A checkpoint is written every minute to OUT/checkpoint, and the same command resumes from it; with
smaller budgets than were spent it packages what is there. The decoder and the transformer may be trained on; training
the VAE on changes the latents that both were trained for. The result is OUT/pipeline, in float16.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from dmquant.diffusers_backend import save_pipeline
from dmquant.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

IMAGE_SIZE = 64
LATENT_CHANNELS = 16
TEXT_LENGTH = 24
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHARE_OF_MINUTES = {"vae": 0.25, "decoder": 0.15, "transformer": 0.6}
WARMUP_STEPS = 100
CHECKPOINT_SECONDS = 60
LOG_SECONDS = 20


def load_emoji(package: Path) -> tuple[Tensor, list[str]]:
    """Images (N, 3, 64, 64), float32 in [-1, 1] on white, and captions like 'red apple, food & drink, food fruit'."""
    images, captions = [], []
    for entry in json.loads((package / "emoji.json").read_text()):
        path = package / "img/google/64" / entry["image"]
        if not entry.get("has_img_google") or not path.exists():
            continue
        icon = Image.open(path).convert("RGBA").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", icon.size, "white")
        canvas.alpha_composite(icon)
        images.append(np.asarray(canvas.convert("RGB")))
        name = (entry["name"] or entry["short_name"].replace("_", " ").replace("-", " ")).lower()
        group = (entry.get("subcategory") or "").replace("-", " ")
        captions.append(f"{name}, {entry['category'].lower()}, {group}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=2048, special_tokens=specials, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


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


def make_text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def make_transformer(width: int, depth: int) -> PixArtTransformer2DModel:
    """16 tokens of 2x2 latents. Residual branches and the output start at zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,  # the second half is PixArt's learned variance; the pipeline drops it
        num_layers=depth,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=128,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    for block in transformer.transformer_blocks:
        for last in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


class Training:
    """Trains `modules` until their minutes are spent, then leaves the running average in their parameters.

    A checkpoint of the same name in `folder` is resumed. All randomness must come from torch's CPU generator, which
    the checkpoint holds.
    """

    def __init__(
        self,
        name: str,
        modules: dict[str, torch.nn.Module],
        optimizers: list[torch.optim.Optimizer],
        minutes: float,
        decay: float,
        folder: Path,
    ):
        self.name, self.modules, self.optimizers = name, torch.nn.ModuleDict(modules), optimizers
        self.groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.budget, self.decay, self.file = 60 * minutes, decay, folder / f"{name}.pt"
        self.parameters = list(self.modules.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.steps, self.seconds = 0, 0.0
        if self.file.exists():
            self._resume()

    def run(self, loss_of_batch: Callable[[], Tensor], schedule: Callable[[float], float]) -> None:
        """`schedule` maps the share of the budget spent to a factor on the learning rates."""
        logged = saved = self.seconds
        before = time.monotonic()
        while self.seconds < self.budget:
            loss = self._step(loss_of_batch, schedule(self.seconds / self.budget))
            now = time.monotonic()
            self.seconds, before = self.seconds + now - before, now
            if self.seconds - logged > LOG_SECONDS:
                logged = self.seconds
                left = (self.budget - self.seconds) / 60
                print(f"{self.name}: step {self.steps}, loss {loss:.4f}, {left:.1f} min left", flush=True)
            if self.seconds - saved > CHECKPOINT_SECONDS or self.seconds >= self.budget:
                saved = self.seconds
                self._save()
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.data.copy_(mean)
        self.modules.eval()

    def _step(self, loss_of_batch: Callable[[], Tensor], factor: float) -> float:
        factor *= min(1, (self.steps + 1) / WARMUP_STEPS)
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return loss.item()

    def _save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "steps": self.steps,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        torch.save(state, part)
        part.replace(self.file)

    def _resume(self) -> None:
        state = torch.load(self.file, map_location=self.average[0].device, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch._foreach_copy_(self.average, state["average"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        print(f"{self.name}: resumed at step {self.steps}, {self.seconds / 60:.1f} minutes spent", flush=True)

    def facts(self) -> dict[str, float]:
        return {"steps": self.steps, "minutes": round(self.seconds / 60, 2)}


def cosine(spent: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * spent)) + 0.01


def hold_then_fall(spent: float) -> float:
    return min(1.0, max(0.01, 2 * (1 - spent)))


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


def train_transformer(
    latents: Tensor,
    captions: list[str],
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    batch: int,
    width: int,
    depth: int,
    folder: Path,
) -> tuple[T5EncoderModel, PixArtTransformer2DModel, dict]:
    """Text encoder and transformer together, on velocity prediction; 10 % of the captions are dropped."""
    device = latents.device
    text = make_text_encoder(len(tokenizer)).to(device)
    transformer = make_transformer(width, depth).to(device)
    if device.type == "cpu":  # the backward pass of the fused attention takes more time there than all else together
        transformer.set_attn_processor(AttnProcessor())
    matrices = [p for p in transformer.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]
    chosen = {id(p) for p in matrices}
    others = [p for p in [*text.parameters(), *transformer.parameters()] if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]
    modules = {"text": text, "transformer": transformer}
    training = Training("transformer", modules, optimizers, minutes, 0.998, folder)
    alphas = DPMSolverMultistepScheduler(**NOISE).alphas_cumprod.to(device)
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).to(device)

    def predict(noisy: Tensor, caption: Tensor, t: Tensor) -> Tensor:
        mask = tokens.attention_mask[caption]
        return transformer(
            noisy,
            encoder_hidden_states=text(tokens.input_ids[caption], attention_mask=mask)[0],
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0][:, :LATENT_CHANNELS]

    def loss_of_batch() -> Tensor:
        index = torch.randint(0, len(latents), (batch,))
        caption = torch.where(torch.rand(batch) < 0.1, len(captions), index).to(device)
        t = torch.randint(0, len(alphas), (batch,)).to(device)
        noise = torch.randn(batch, *latents.shape[1:]).to(device)
        clean, alpha = latents[index.to(device)], alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(noisy, caption, t)
        # min-SNR-5 (Hang et al. 2303.09556), but not zero at pure noise, where the caption alone decides the picture
        weight = (6 * (1 - alpha)).clamp(max=1)
        return (weight * (predicted.float() - velocity) ** 2).mean()

    training.run(loss_of_batch, hold_then_fall)
    return text, transformer, training.facts() | {"batch": batch, "width": width, "depth": depth}


def write_pipeline(tokenizer, text, vae, transformer, folder: Path) -> None:
    """Write a PixArtSigmaPipeline in float16."""
    scheduler = DPMSolverMultistepScheduler(**NOISE, algorithm_type="dpmsolver++", prediction_type="v_prediction")
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler
    )
    save_pipeline(pipeline.to("cpu", torch.float16), folder)
    # transformers 5 writes its own class name, which transformers 4 does not know; both read the older one.
    for file in (folder / "model_index.json", folder / "tokenizer/tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--minutes", type=float, default=120, help="the compute budget, shared by the three stages")
    for stage, share in SHARE_OF_MINUTES.items():
        parser.add_argument(f"--{stage}-minutes", type=float, help=f"of that for the {stage}; default {share:.0%}")
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--transformer-batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    if not (options.data / "emoji.json").exists():
        sys.exit(f"{options.data} is not the unpacked emoji-datasource-google package: it has no emoji.json")
    logging.set_verbosity_error()  # or every save in float16 says that float16 does not run on CPUs
    given = {stage: getattr(options, f"{stage}_minutes") for stage in SHARE_OF_MINUTES}
    minutes = {
        stage: options.minutes * share if given[stage] is None else given[stage]
        for stage, share in SHARE_OF_MINUTES.items()
    }
    torch.manual_seed(options.seed)
    checkpoints = options.out / "checkpoint"
    images, captions = load_emoji(options.data)
    images = images.to(options.device)
    tokenizer = make_tokenizer(captions)

    vae, vae_facts = train_vae(images, minutes["vae"], options.vae_batch, checkpoints)
    means, deviations = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / means.std()))
    decoder_facts = refine_decoder(vae, means, deviations, images, minutes["decoder"], options.vae_batch, checkpoints)
    psnr = reconstruction_psnr(vae, means, images)
    print(f"vae: reconstruction PSNR {psnr:.2f} dB", flush=True)
    text, transformer, transformer_facts = train_transformer(
        means * vae.config.scaling_factor,
        captions,
        tokenizer,
        minutes["transformer"],
        options.transformer_batch,
        options.width,
        options.depth,
        checkpoints,
    )
    write_pipeline(tokenizer, text, vae, transformer, options.out / "pipeline")
    facts = {
        "seed": options.seed,
        "device": options.device,
        "torch": torch.__version__,
        "images": len(images),
        "vae": vae_facts | {"batch": options.vae_batch},
        "decoder": decoder_facts | {"batch": options.vae_batch},
        "transformer": transformer_facts,
        "reconstruction_psnr_db": round(psnr, 2),
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
