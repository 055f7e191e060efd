"""A pipeline without diffusers whose every call is known: z <- z - size_s * output_s, with outputs that ignore z."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

SHAPE = (4, 16, 16)


@dataclass
class Output:
    sample: torch.Tensor


class Backbone(torch.nn.Module):
    """Answers `values[step]` everywhere, wrapped as asked for."""

    def __init__(self, values, wrap=lambda prediction: (prediction,)):
        super().__init__()
        self.values, self.wrap, self.calls = values, wrap, 0

    def forward(self, sample, timestep, encoder_hidden_states=None, extra=None, **others):
        self.calls += 1
        return self.wrap(torch.full_like(sample, self.values[int(timestep)]))


class Toy:
    """Stands for a diffusers pipeline of `len(sizes)` steps without guidance, one less for the prompt `ends_early`."""

    def __init__(self, sizes, values=None, wrap=lambda prediction: (prediction,), extra=None, ends_early=None):
        self.sizes = sizes
        self.unet = Backbone(values or [1.0] * len(sizes), wrap)
        self.extra, self.ends_early = extra, ends_early

    def set_progress_bar_config(self, **config):
        pass

    def __call__(self, prompt, generator, output_type, num_inference_steps):
        latents = torch.stack([torch.randn(SHAPE, generator=one) for one in generator])
        text = torch.stack([torch.full((3,), float(len(one))) for one in prompt])
        for step, size in enumerate(self.sizes[:-1] if self.ends_early in prompt else self.sizes):
            output = self.unet(latents, torch.tensor(step), encoder_hidden_states=text, extra=self.extra)
            prediction = output if isinstance(output, torch.Tensor) else getattr(output, "sample", None)
            latents = latents - size * (output[0] if prediction is None else prediction)
        return SimpleNamespace(images=latents)
