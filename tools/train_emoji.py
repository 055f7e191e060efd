"""Train the embedded model `emoji-pixart`: a small PixArt-Sigma text-to-image pipeline on captioned emoji.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/train_emoji.py --data package --out build/emoji-pixart --vae-minutes 25 --dit-minutes 120

Runs on CPU (bfloat16 autocast) and CUDA. The learning rate follows the share of the time budget spent, so any
budget ends annealed. A checkpoint is written every minute to OUT/checkpoint; the same command resumes from it.
The result, in float16, is OUT/pipeline.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from dmquant.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor  # noqa: E402
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel  # noqa: E402

IMAGE_SIZE = 64
TEXT_LENGTH = 24
CHECKPOINT_SECONDS = 60


def load_emoji(package: Path) -> tuple[torch.Tensor, list[str]]:
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
    tokenizer.train_from_iterator(
        captions, trainers.UnigramTrainer(vocab_size=2048, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
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
        latent_channels=16,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )
    # Starting at unit posterior noise, the decoder learns to ignore the latents before they carry anything.
    torch.nn.init.constant_(vae.quant_conv.bias[16:], -4.0)
    return vae


def make_text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
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
    )


def make_transformer(width: int, depth: int) -> PixArtTransformer2DModel:
    """16 tokens of 2x2 latents. Residual branches and the output start at zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=width // 32,
        attention_head_dim=32,
        in_channels=16,
        out_channels=32,  # the second half is PixArt's learned variance; the pipeline drops it
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
    """A loop over `step` until its minutes are spent: clipping, exponential average, checkpoints, resuming."""

    def __init__(self, name, modules, optimizers, minutes, checkpoints: Path, decay=0.9995):
        self.name, self.modules, self.optimizers = name, torch.nn.ModuleDict(modules), optimizers
        self.budget, self.decay = minutes * 60, decay
        self.file = checkpoints / f"{name}.pt"
        self.average = [p.detach().clone() for p in self.modules.parameters()]
        self.steps, self.seconds = 0, 0.0
        if self.file.exists():
            self._resume()

    def run(self, loss_of_batch, rate_of_progress):
        """Train; returns once the parameters hold their running average."""
        parameters = list(self.modules.parameters())
        shown, last_shown, tick = 0.0, self.seconds, time.monotonic()
        last_saved = self.seconds
        base_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        while self.seconds < self.budget:
            rate = rate_of_progress(self.seconds / self.budget) * min(1, (self.steps + 1) / 100)
            groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
            for group, base in zip(groups, base_rates, strict=True):
                group["lr"] = base * rate
            loss = loss_of_batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.steps += 1
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1 - decay)
            now = time.monotonic()
            self.seconds, tick = self.seconds + now - tick, now
            shown = loss.item() if shown == 0 else 0.99 * shown + 0.01 * loss.item()
            if self.seconds - last_shown > 20:
                last_shown = self.seconds
                left = (self.budget - self.seconds) / 60
                print(f"{self.name}: step {self.steps}, loss {shown:.4f}, {left:.1f} min left", flush=True)
            if self.seconds - last_saved > CHECKPOINT_SECONDS or self.seconds >= self.budget:
                last_saved = self.seconds
                for group, base in zip(groups, base_rates, strict=True):
                    group["lr"] = base
                self._save()
        for parameter, mean in zip(parameters, self.average, strict=True):
            parameter.data.copy_(mean)
        self.modules.eval()

    def _save(self):
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        torch.save(
            {
                "modules": self.modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "average": self.average,
                "steps": self.steps,
                "seconds": self.seconds,
                "random": torch.get_rng_state(),
            },
            part,
        )
        part.replace(self.file)

    def _resume(self):
        state = torch.load(self.file, map_location=self.average[0].device, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch._foreach_copy_(self.average, state["average"])
        self.steps, self.seconds = state["steps"], state["seconds"]
        torch.set_rng_state(state["random"].cpu())
        print(f"{self.name}: resumed at step {self.steps}, {self.seconds / 60:.1f} minutes spent", flush=True)


def train_vae(images, minutes, batch, checkpoints):
    device = images.device
    vae = make_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.99))
    training = Training("vae", {"vae": vae}, [optimizer], minutes, checkpoints, decay=0.999)

    def reconstruct(x):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn_like(posterior.mean) * posterior.std.clamp(max=1.0)
        return vae.decode(posterior.mean + noise).sample, posterior.kl()

    def loss_of_batch():
        x = images[torch.randint(0, len(images), (batch,)).to(device)]
        x = x.flip(3) if torch.rand(1) < 0.5 else x
        with torch.autocast(device.type, torch.bfloat16):
            y, kl = reconstruct(x)
        y, latent_size = y.float(), 8 * 8 * 16
        coarse = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        return F.l1_loss(y, x) + 0.5 * F.mse_loss(y, x) + 0.5 * coarse + 1e-3 * kl.float().mean() / latent_size

    training.run(loss_of_batch, lambda spent: 0.5 * (1 + math.cos(math.pi * spent)) + 0.01)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
        errors = [
            F.mse_loss(vae.decode(z).sample, x) for z, x in zip(latents.split(64), images.split(64), strict=True)
        ]
    psnr = 10 * math.log10(4 / torch.stack(errors).mean().item())
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    print(f"vae: {training.steps} steps of {batch}, reconstruction PSNR {psnr:.2f} dB", flush=True)
    return vae, latents * vae.config.scaling_factor, {"steps": training.steps, "batch": batch, "psnr": psnr}


def train_transformer(latents, captions, tokenizer, minutes, batch, width, depth, checkpoints):
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
    training = Training("transformer", modules, optimizers, minutes, checkpoints, decay=0.998)
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, device=device), 0)
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    ids, masks = tokens.input_ids.to(device), tokens.attention_mask.to(device)
    empty = {"resolution": None, "aspect_ratio": None}

    def predict(noisy, ids, mask, t):
        context = text(ids, attention_mask=mask)[0]
        return transformer(
            noisy,
            encoder_hidden_states=context,
            encoder_attention_mask=mask,
            timestep=t,
            added_cond_kwargs=empty,
            return_dict=False,
        )[0][:, :16]

    def loss_of_batch():
        index = torch.randint(0, len(latents), (batch,))
        caption = torch.where(torch.rand(batch) < 0.1, len(captions), index).to(device)
        index = index.to(device)
        t = torch.randint(0, 1000, (batch,)).to(device)
        noise = torch.randn(batch, *latents.shape[1:]).to(device)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents[index] + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents[index]
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(noisy, ids[caption], masks[caption], t)
        # min-SNR-5 (Hang et al. 2303.09556) without its zero at pure noise, where the caption alone decides the picture
        weight = (6 * (1 - alpha)).clamp(max=1)
        return (weight * (predicted.float() - velocity) ** 2).mean()

    training.run(loss_of_batch, lambda spent: 1 if spent < 0.5 else max(0.01, (1 - spent) / 0.5))
    print(f"transformer: {training.steps} steps of {batch}", flush=True)
    return text, transformer, {"steps": training.steps, "batch": batch, "width": width, "depth": depth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--vae-minutes", type=float, default=25)
    parser.add_argument("--dit-minutes", type=float, default=120)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--dit-batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if not (options.data / "emoji.json").exists():
        sys.exit(f"{options.data} is not the unpacked emoji-datasource-google package: it has no emoji.json")
    torch.manual_seed(options.seed)
    images, captions = load_emoji(options.data)
    images = images.to(options.device)
    tokenizer = make_tokenizer(captions)
    checkpoints = options.out / "checkpoint"
    vae, latents, vae_facts = train_vae(
        images, options.vae_minutes, options.vae_batch, checkpoints
    )
    text, transformer, dit_facts = train_transformer(
        latents,
        captions,
        tokenizer,
        options.dit_minutes,
        options.dit_batch,
        options.width,
        options.depth,
        checkpoints,
    )
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type="dpmsolver++",
        prediction_type="v_prediction",
    )
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.to("cpu", torch.float16).save_pretrained(options.out / "pipeline")
    facts = {
        "seed": options.seed,
        "device": options.device,
        "vae": vae_facts | {"minutes": options.vae_minutes},
        "transformer": dit_facts | {"minutes": options.dit_minutes},
        "torch": torch.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
