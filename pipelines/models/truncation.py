"""Prompts that are longer than a text encoder takes: the pipeline cuts them, and here they are counted."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmquant.diffusers.families import family_of_pipeline

LENGTH = "max_sequence_length"
SHOWN = 8


@dataclass(frozen=True)
class Cut:
    """The prompts, by index, that one tokenizer cuts: they are longer than its `limit` of tokens."""

    tokenizer: str
    limit: int
    indices: tuple[int, ...]

    @property
    def encoder(self) -> str:
        """The pipeline's text encoder that reads the prompt as cut."""
        return self.tokenizer.replace("tokenizer", "text_encoder")


def cut_prompts(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> list[Cut]:
    """Find the prompts that each tokenizer of a diffusers pipeline cuts; none for a pipeline that is told classes.

    `call` holds the arguments of the pipeline's call, which may set the length. A tokenizer whose text encoder was
    left out reads nothing and has no entry.
    """
    parameters = inspect.signature(type(pipeline).__call__).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    arguments = defaults | dict(call)
    cuts = []
    for name in sorted(name for name in pipeline.components if name.startswith("tokenizer")):
        tokenizer = pipeline.components[name]
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if tokenizer is None or encoder is None:
            continue
        limit = _limit(pipeline, name, tokenizer, encoder, arguments)
        lengths = _lengths(pipeline, name, prompts, arguments)
        cuts.append(Cut(name, limit, tuple(index for index, length in enumerate(lengths) if length > limit)))
    return cuts


def cut_line(cuts: Sequence[Cut], total: int) -> str | None:
    """A line that counts and names the images whose prompts, of `total`, are cut; None if none is.

    As in `3 of 64 prompts are cut to the text encoder's 77 tokens: 00004, 00017, 00031`.
    """
    by_limit: dict[int, list[Cut]] = {}
    for cut in cuts:
        if cut.indices:
            by_limit.setdefault(cut.limit, []).append(cut)
    if not by_limit:
        return None
    parts = []
    for limit, same in sorted(by_limit.items()):
        indices = sorted({index for cut in same for index in cut.indices})
        room = f"the text encoder's {limit} tokens" if len(cuts) == 1 else f"the {limit} tokens of {_encoders(same)}"
        parts.append(f"{len(indices)} of {total} prompts are cut to {room}: {_images(indices)}")
    if whole := [cut for cut in cuts if not cut.indices]:
        parts.append(f"nothing is cut for {_encoders(whole)}")
    return "; ".join(parts)


def _encoders(cuts: Sequence[Cut]) -> str:
    return " and ".join(cut.encoder for cut in cuts)


def _images(indices: Sequence[int]) -> str:
    names = ", ".join(f"{index:05d}" for index in indices[:SHOWN])
    return names if len(indices) <= SHOWN else f"{names} and {len(indices) - SHOWN} more"


def _limit(pipeline: Any, name: str, tokenizer: Any, encoder: Any, arguments: Mapping[str, Any]) -> int:
    """Tokens, start and end included, that the pipeline hands to one text encoder.

    CLIP has learned positions, so that every pipeline gives it what its tokenizer allows; `max_sequence_length` is for
    the others.
    """
    family = family_of_pipeline(type(pipeline).__name__)
    if family is not None and name in family.token_limits:
        return family.token_limits[name]
    is_clip = getattr(encoder.config, "model_type", "").startswith("clip")
    return (None if is_clip else arguments.get(LENGTH)) or tokenizer.model_max_length


def _lengths(pipeline: Any, name: str, prompts: Sequence[str], arguments: Mapping[str, Any]) -> list[int]:
    """Tokens of each prompt, start and end included, as the pipeline would tokenize it if nothing were cut."""
    family = family_of_pipeline(type(pipeline).__name__)
    if family is not None and family.lengths is not None:
        return family.lengths(pipeline, name, prompts)
    tokenizer = pipeline.components[name]
    texts = list(prompts)
    if hasattr(pipeline, "_text_preprocessing"):  # PixArt, Sana: in lower case, and cleaned if the call says so
        texts = pipeline._text_preprocessing(texts, clean_caption=arguments.get("clean_caption", False))
    before = 0
    if instruction := arguments.get("complex_human_instruction"):  # Sana: before the prompt, and beyond its length
        before = len(tokenizer.encode("\n".join(instruction))) - 2
        texts = ["\n".join(instruction) + text for text in texts]
    return [len(ids) - before for ids in tokenizer(texts, truncation=False, verbose=False).input_ids]
