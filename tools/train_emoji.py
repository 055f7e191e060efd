"""Train an embedded model: a small text-to-image pipeline on captioned emoji.

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
    python tools/train_emoji.py pixart --data package --out build/emoji-pixart --minutes 120
    python tools/train_emoji.py sd --data package --out build/emoji-sd --vae build/emoji-pixart/pipeline/vae
    python tools/train_emoji.py flux --data package --out build/emoji-flux --vae build/emoji-pixart/pipeline/vae

Runs on CPU and CUDA, in bfloat16 autocast unless told otherwise. The learning rate follows the share of the budget
spent, so any budget ends annealed. A checkpoint is written every minute to OUT/checkpoint, and the same command resumes
from it; with smaller budgets than were spent it packages what is there. The decoder and the denoiser may be trained on;
training the VAE on changes the latents that both were trained for. The result is OUT/pipeline, in float16.
"""

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from dmquant.diffusers.saving import save_pipeline
from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

import emoji_flux
import emoji_pixart
import emoji_sd
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging
from emoji_data import TEXT_LENGTH, learnt, load_emoji, make_tokenizer
from emoji_training import Training, hold_then_fall
from emoji_vae import encode, reconstruction_psnr, refine_decoder, train_vae
from transformers import PreTrainedTokenizerFast

MODELS = {"pixart": emoji_pixart, "sd": emoji_sd, "flux": emoji_flux}
NOISE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARE_OF_MINUTES = {"vae": 0.25, "decoder": 0.15, "denoiser": 0.6}


def train_denoiser(
    model: ModuleType,
    latents: Tensor,
    captions: list[str],
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    batch: int,
    width: int,
    depth: int,
    folder: Path,
    precision: torch.dtype,
) -> tuple[torch.nn.Module, torch.nn.Module, dict]:
    """Text encoder and denoiser together, on velocity prediction or flow matching; 10 % of the captions are dropped."""
    device = latents.device
    text = model.make_text_encoder(len(tokenizer)).to(device)
    denoiser = model.make_denoiser(width, depth).to(device)
    flows = hasattr(model, "make_scheduler")
    if device.type == "cpu" and not flows:
        # the backward pass of the fused attention of these sizes takes more time there than all else together
        denoiser.set_attn_processor(AttnProcessor())
    matrices = model.matrices(denoiser)
    chosen = {id(p) for p in matrices}
    others = [p for p in [*text.parameters(), *denoiser.parameters()] if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.99)),
    ]
    training = Training("denoiser", {"text": text, "denoiser": denoiser}, optimizers, minutes, 0.998, folder)
    alphas = DPMSolverMultistepScheduler(**NOISE).alphas_cumprod.to(device)
    tokens = tokenizer(
        [*captions, ""], padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).to(device)

    def loss_of_batch() -> Tensor:
        index = torch.randint(0, len(latents), (batch,))
        caption = torch.where(torch.rand(batch) < 0.1, len(captions), index).to(device)
        noise = torch.randn(batch, *latents.shape[1:]).to(device)
        clean = latents[index.to(device)]
        if flows:
            share = torch.randn(batch).sigmoid().to(device)
            kept = share.view(-1, 1, 1, 1)
            noisy, velocity, t, weight = (1 - kept) * clean + kept * noise, noise - clean, 1000 * share, 1.0
        else:
            t = torch.randint(0, len(alphas), (batch,)).to(device)
            alpha = alphas[t].view(-1, 1, 1, 1)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
            # min-SNR-5 (Hang et al. 2303.09556), but not zero at pure noise, where the caption alone decides all
            weight = (6 * (1 - alpha)).clamp(max=1)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            predicted = model.predict(
                text, denoiser, noisy, tokens.input_ids[caption], tokens.attention_mask[caption], t
            )
        return (weight * (predicted.float() - velocity) ** 2).mean()

    training.run(loss_of_batch, hold_then_fall)
    return text, denoiser, training.facts() | {"batch": batch, "width": width, "depth": depth}


def write_pipeline(pipeline, folder: Path) -> None:
    """Write a pipeline in float16."""
    save_pipeline(pipeline.to("cpu", torch.float16), folder)
    # transformers 5 writes its own class name, which transformers 4 does not know; both read the older one.
    for file in (folder / "model_index.json", folder / "tokenizer/tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the pipeline")
    parser.add_argument("--vae", type=Path, help="folder of a finished VAE to share, instead of training one")
    parser.add_argument("--minutes", type=float, default=120, help="the compute budget, shared by the three stages")
    for stage, share in SHARE_OF_MINUTES.items():
        parser.add_argument(f"--{stage}-minutes", type=float, help=f"of that for the {stage}; default {share:.0%}")
    parser.add_argument("--vae-batch", type=int, default=8)
    parser.add_argument("--denoiser-batch", type=int, default=128)
    parser.add_argument("--width", type=int, help="channels of the denoiser; default 256 (pixart), 64 (sd), 192 (flux)")
    parser.add_argument(
        "--depth", type=int, help="its blocks, or resnets a block; default 5 (pixart), 1 (sd), 6 (flux)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the denoiser's training")
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
    model, checkpoints = MODELS[options.model], options.out / "checkpoint"
    images, captions = load_emoji(options.data)
    trained_on = learnt(len(images), getattr(model, "HELD_OUT", 0))
    images, captions = images[trained_on].to(options.device), [captions[index] for index in trained_on]
    tokenizer = make_tokenizer(captions)
    facts = {
        "model": options.model,
        "seed": options.seed,
        "device": options.device,
        "torch": torch.__version__,
        "images": len(images),
    }

    if options.vae:
        vae = AutoencoderKL.from_pretrained(options.vae, dtype=torch.float32).to(options.device)
        means, _ = encode(vae, images)
        facts["vae"] = "shared"
    else:
        vae, trained = train_vae(images, minutes["vae"], options.vae_batch, checkpoints)
        means, deviations = encode(vae, images)
        vae.register_to_config(scaling_factor=float(1 / means.std()))
        refined = refine_decoder(vae, means, deviations, images, minutes["decoder"], options.vae_batch, checkpoints)
        facts |= {stage: f | {"batch": options.vae_batch} for stage, f in (("vae", trained), ("decoder", refined))}
    facts["reconstruction_psnr_db"] = round(reconstruction_psnr(vae, means, images), 2)
    print(f"vae: reconstruction PSNR {facts['reconstruction_psnr_db']:.2f} dB", flush=True)
    text, denoiser, facts["denoiser"] = train_denoiser(
        model,
        means * vae.config.scaling_factor,
        captions,
        tokenizer,
        minutes["denoiser"],
        options.denoiser_batch,
        options.width or model.WIDTH,
        options.depth or model.DEPTH,
        checkpoints,
        PRECISIONS[options.precision],
    )
    if hasattr(model, "make_scheduler"):
        scheduler = model.make_scheduler()
    else:
        # StableDiffusionPipeline asks for this offset; at the default spacing of timesteps it changes nothing.
        solver = {"algorithm_type": "dpmsolver++", "prediction_type": "v_prediction", "steps_offset": 1}
        scheduler = DPMSolverMultistepScheduler(**NOISE, **solver)
    write_pipeline(model.make_pipeline(tokenizer, text, vae, denoiser, scheduler), options.out / "pipeline")
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
