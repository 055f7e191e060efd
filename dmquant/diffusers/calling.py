"""Calls of a diffusers pipeline, to make images and to learn from it alike."""

import contextlib
import inspect
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmquant.diffusers.families import family_of_pipeline
from dmquant.diffusers.posterior import seeded_posterior
from dmquant.errors import UserError

QUOTED = 160  # characters of another's error
READERS = ("text_encoder", "tokenizer")  # names of the parts that read prompts begin so


def call_pipeline(
    pipeline: Any,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    output_type: str,
    call: dict[str, Any],
    differentiable: bool = False,
) -> Any:
    """The images or videos, or their latents, by `output_type`, of one call, without a progress bar, and without
    gradients unless the call is to be `differentiable`: then through the sampler as well.

    Every image starts from the noise of its own seed, drawn on the CPU, so that it depends neither on the batch nor on
    the device. `call` holds the arguments other than prompt, generator and output type; with the embeddings of prompts
    among them, `prompts` are None. Raises UserError for a pipeline without the parts that this takes, and for
    one that fails.
    """
    _check_parts(pipeline, prompts is not None, output_type != "latent")
    given = {} if prompts is None else {"prompt": list(prompts)}
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    # diffusers decorates the call with torch.no_grad
    run = inspect.unwrap(type(pipeline).__call__) if differentiable else type(pipeline).__call__
    with (
        _no_progress_bar(pipeline),
        seeded_posterior(pipeline, seeds),
        torch.set_grad_enabled(differentiable),
        _refusing(type(pipeline).__name__, call),
    ):
        made = run(pipeline, **given, generator=generators, output_type=output_type, **call)
        return made.frames if hasattr(made, "frames") else made.images


@contextlib.contextmanager
def _refusing(kind: str, call: Iterable[str]) -> Iterator[None]:
    """UserError for what a pipeline of this kind, or one of its parts, raises in a call with these arguments."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", QUOTED, placeholder=" ...")
        given = ", ".join(["prompts", *call])
        raise UserError(
            f"the {kind} cannot be called with {given}: {reason}: correct that argument, or that part of the pipeline"
        ) from error


def _check_parts(pipeline: Any, takes_prompts: bool, makes_images: bool) -> None:
    """UserError for a part that a call needs and the pipeline was loaded without."""
    kind = type(pipeline).__name__
    family = family_of_pipeline(kind)
    spare = family.may_lack.get(kind, ()) if family else ()
    needed = ("scheduler", *(READERS if takes_prompts else ()), *(("vae",) if makes_images else ()))
    absent = [
        name
        for name, part in getattr(pipeline, "components", {}).items()
        if part is None and name.startswith(needed) and name not in spare
    ]
    if not absent:
        return
    takes, otherwise = "makes no images", ""
    if any(name.startswith(READERS) for name in absent):
        takes, otherwise = "takes no prompts", ", or calibrate with prompt_embeds in quantize_pipeline"
    raise UserError(
        f"this {kind} has no {' and no '.join(absent)}, so it {takes}: add what is missing to its "
        f"folder and model_index.json{otherwise}"
    )


@contextlib.contextmanager
def _no_progress_bar(pipeline: Any) -> Iterator[None]:
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    pipeline.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)


def final_latents(pipeline: Any, prompts: Sequence[str], seed: int, call: dict[str, Any]) -> Tensor:
    """Latents (prompts, channels, height, width) at the end of the schedule; prompt i has its own seed, `seed` + i.

    Args:
        call: arguments of the pipeline's call other than prompt, generator and output type.
    """
    seeds = [seed + index for index in range(len(prompts))]
    return call_pipeline(pipeline, prompts, seeds, "latent", call)


def backbone_calls(pipeline: Any, steps: int, strength: float | None = None) -> int:
    """Calls of the backbone in one pipeline call of `steps` steps: some schedulers add some, and a pipeline that
    changes an image leaves out the first, but for a share of `strength`."""
    scheduler = pipeline.scheduler
    # The shift by image size moves timesteps and adds none, but flow matching refuses to go without.
    shift = {"mu": 0.0} if getattr(scheduler.config, "use_dynamic_shifting", False) else {}
    scheduler.set_timesteps(steps, **shift)
    if strength is not None:
        return len(pipeline.get_timesteps(steps, strength, "cpu")[0])
    return len(scheduler.timesteps)
