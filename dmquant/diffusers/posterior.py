"""The noise that a VAE encodes an image with, where a pipeline leaves that to the global generator of torch."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

APART = 1 << 40
"""Between the seed of an image's own noise and that of its encoding, or the two would be the same numbers."""


@contextlib.contextmanager
def seeded_posterior(pipeline: Any, seeds: Sequence[int]) -> Iterator[None]:
    """Let each row that the pipeline's VAE encodes be drawn by a seed of its own while the block runs.

    The ControlNet pipelines of HunyuanDiT and SD3 draw the encodings of control images from the global generator: an
    image would depend on all that was drawn before. Rows are those of the images of the `seeds`, once or repeated; a
    generator that a pipeline gives counts as before.
    """
    vae = getattr(pipeline, "vae", None)
    if not hasattr(vae, "encode"):
        yield
        return
    encode, own = vae.encode, vars(vae).get("encode")

    @functools.wraps(encode)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        output = encode(*args, **kwargs)
        posterior = getattr(output, "latent_dist", None)
        if posterior is not None:
            posterior.sample = functools.partial(_drawn, posterior.sample, len(posterior.mean), seeds)
        return output

    vae.encode = seeded
    try:
        yield
    finally:
        del vae.encode
        if own is not None:
            vae.encode = own


def _drawn(sample: Any, rows: int, seeds: Sequence[int], generator: Any = None) -> Tensor:
    if generator is None:
        generator = [torch.Generator("cpu").manual_seed(APART + seeds[row % len(seeds)]) for row in range(rows)]
    return sample(generator)
