"""The loss of a LoRA that learns on emoji-sd in full precision and at W4A6, drawn.

    python benchmarks/lora_training.py [--steps 40] [--rate 5e-3] [--out docs/images/lora-training.png]

Images that the model makes itself, with red and blue swapped, are what it is to learn; noise, timesteps and the LoRA
that training starts from are the same for both. The loss drawn is that of fixed noise at fixed timesteps of these
images, every few steps, as a share of full precision's at the start.
"""

import argparse
import copy
from importlib.resources import files

import torch

import dmquant  # before diffusers, for which it makes torchvision importable

from diffusers import DDPMScheduler  # isort: skip
from peft import LoraConfig  # isort: skip

PROMPTS = ["a red heart", "a cat", "an apple", "a blue car", "a face with a smile", "a green leaf", "a house", "a fish"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--out", default="docs/images/lora-training.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = dmquant.load_pipeline(files("dmquant.pipelines") / "assets" / "emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(PROMPTS, num_inference_steps=10, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    with torch.no_grad():
        latents = pipe.vae.encode(2 * images.flip(1) - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        text = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    quantized = copy.deepcopy(pipe.unet)
    dmquant.quantize_(quantized, "w4a6")
    curves = {}
    for name, unet in {"full precision": pipe.unet, "W4A6": quantized}.items():
        curves[name] = train(unet, schedule, latents, text, options)
        print(name, " ".join(f"{step}: {loss:.4f}" for step, loss in curves[name]), flush=True)
    draw(curves, options.out)


def train(unet, schedule, latents, text, options) -> list[tuple[int, float]]:
    """Losses by step."""
    unet.requires_grad_(False)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.train()
    optimizer = torch.optim.AdamW([one for one in unet.parameters() if one.requires_grad], lr=options.rate)
    generator, losses = torch.Generator().manual_seed(1), []

    def loss_of(noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        predicted = unet(schedule.add_noise(latents, noise, timesteps), timesteps, text).sample
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if velocity else noise
        return (predicted - target).square().mean()

    fixed = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    at = torch.linspace(50, 950, len(latents)).long()
    for step in range(options.steps + 1):
        if step % 4 == 0:
            with torch.no_grad():
                losses.append((step, loss_of(fixed, at).item()))
        noise = torch.randn(latents.shape, generator=generator)
        loss_of(noise, torch.randint(0, 1000, (len(latents),), generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def draw(curves: dict[str, list[tuple[int, float]]], out: str) -> None:
    """Both curves in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    first = next(iter(curves.values()))[0][1]
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, [value / first for value in values], style, marker="o", markersize=3, label=name)
    axes.set(xlabel="steps of the LoRA", ylabel="loss, of full precision's first", ylim=(0, None))
    axes.legend()
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main()
