"""The images that were typed to go into the pipeline beside its prompts, and the pipeline that takes them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmquant.diffusers.families import families
from dmquant.diffusers.imaged import argument_for, with_parts_of
from dmquant.errors import UsageError, UserError
from dmquant.evaluation import image_files
from dmquant.evaluation.images import image_size
from dmquant.evaluation.pictures import MASK, RGB, FilePicture
from dmquant.host.console import Console
from dmquant.pipelines.models.controlnets import ControlNet
from dmquant.pipelines.models.registry import ModelSpec, call_parameters, family_for, registered_models
from dmquant.pipelines.prompts.lists import PromptSet
from dmquant.pipelines.prompts.readers import PICTURES
from dmquant.pipelines.runs.typed import Options

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

STRENGTH = "strength"
SHOWN = 3
WORDS = {"image": "an image", "mask": "a mask", "control": "a control image"}


@dataclass(frozen=True)
class Inputs:
    """Images for each prompt and each calibration prompt by argument of the call of `pipeline`, which takes them.

    `call` are further arguments of that call, `kinds` is for people what each argument holds, and `resized` a line on
    images that had another size.
    """

    pipeline: str
    kinds: Mapping[str, str]
    of_prompts: Mapping[str, tuple[FilePicture, ...]]
    of_calibration: Mapping[str, tuple[FilePicture, ...]]
    call: Mapping[str, Any] = field(default_factory=dict)
    controlnet: ControlNet | None = None
    resized: str | None = None

    def of_each_prompt(self) -> list[dict[str, FilePicture]]:
        """The images of each prompt by argument."""
        return [dict(zip(self.of_prompts, each, strict=True)) for each in zip(*self.of_prompts.values(), strict=True)]

    @property
    def key(self) -> dict[str, Any]:
        """What the images of a run depend on beside call and pictures, as JSON can hold it."""
        return {"pipeline": self.pipeline, "controlnet": self.controlnet and self.controlnet.sha256}

    @property
    def calibration_key(self) -> dict[str, list[str]]:
        """The pictures that calibration depends on."""
        return {name: [picture.sha256 for picture in each] for name, each in self.of_calibration.items()}

    def taken_by(self, pipeline: "DiffusionPipeline", dtype: torch.dtype, device: str) -> "DiffusionPipeline":
        """The pipeline that takes the images, with the parts of `pipeline`."""
        import diffusers

        if type(pipeline).__name__ == self.pipeline:
            return pipeline
        more = {} if self.controlnet is None else {"controlnet": self.controlnet.load(dtype, device)}
        return with_parts_of(pipeline, getattr(diffusers, self.pipeline), **more)

    def describe(self) -> dict[str, Any]:
        """What run.yaml says of them: of files their names alone."""
        return {
            "pipeline": self.pipeline,
            **self.call,
            "controlnet": None if self.controlnet is None else self.controlnet.describe(),
            **{self.kinds[name]: [picture.path.name for picture in each] for name, each in self.of_prompts.items()},
            "sha256": {self.kinds[name]: [one.sha256 for one in each] for name, each in self.of_prompts.items()},
        }

    def line(self) -> str:
        """A few words on them, for the line on the images of a run."""
        given = " and ".join(WORDS[kind] for kind in self.kinds.values())
        strength = f", strength {self.call[STRENGTH]:g}" if STRENGTH in self.call else ""
        return f"from {given} a prompt{strength} ({self.pipeline})"

    def say(self, console: Console) -> None:
        """Tell what was done to the images."""
        if self.resized:
            console.say(self.resized)


def resolve_inputs(
    typed: Options, model: ModelSpec, prompts: PromptSet, calibration: PromptSet, size: tuple[int, int], steps: int
) -> Inputs | None:
    """The images of a command, found, opened and checked; None where there are none.

    Images of a folder go with the prompts in their order, and over again where they are fewer. Calibration prompts
    without images in their own file get those of the prompts. `size` is width and height.

    Raises UsageError for images that are none or that do not go together, and for a model that does not take them.
    """
    files = _given(typed, prompts)
    kinds = tuple(kind for kind in PICTURES if kind in files)
    pipeline = _pipeline(model, kinds)
    if pipeline is None:
        for option in (STRENGTH, "controlnet"):
            if getattr(typed, option) is not None:
                raise UsageError(f"--{option} is for images: give --{'image' if option == STRENGTH else 'control'} too")
        return None
    parameters = call_parameters(pipeline)
    controlnet = _controlnet(typed, "control" in kinds, pipeline)
    strength = _strength(typed.strength, parameters, pipeline, steps)
    own = calibration.pictures if set(kinds) <= set(calibration.pictures) else {}
    listed = {kind: own.get(kind) or _repeated(files[kind], len(calibration.prompts)) for kind in kinds}
    of_prompts = {kind: _repeated(files[kind], len(prompts.prompts)) for kind in kinds}
    pictures, resized = _pictures([of_prompts, listed], size)
    arguments = {kind: argument_for(kind, parameters) for kind in kinds}

    def by_argument(paths: Mapping[str, Sequence[Path]]) -> dict[str, tuple[FilePicture, ...]]:
        return {arguments[kind]: tuple(pictures[kind, path] for path in paths[kind]) for kind in kinds}

    return Inputs(
        pipeline,
        {argument: kind for kind, argument in arguments.items()},
        by_argument(of_prompts),
        by_argument(listed),
        strength,
        controlnet,
        resized,
    )


def _given(typed: Options, prompts: PromptSet) -> dict[str, Sequence[Path]]:
    """The files of each kind of image: those of an option, else those in the list of prompts."""
    found: dict[str, Sequence[Path]] = dict(prompts.pictures)
    for kind in PICTURES:
        if (path := getattr(typed, kind)) is not None:
            if kind in found:
                raise UsageError(
                    f"{prompts.name} has a column '{kind}': leave --{kind} out, or name {prompts.name}:prompt"
                )
            found[kind] = _images_of(path, f"--{kind}")
    if "mask" in found and "image" not in found:
        raise UsageError("a mask without an image: give the images to change by --image, or in a column 'image'")
    return found


def _images_of(path: Path, option: str) -> list[Path]:
    path = path.expanduser()
    if not path.is_dir():
        return [path]
    try:
        image_files.check_one_kind(path)
        return image_files.in_folder(path)
    except UserError as error:
        raise UsageError(f"{option}: {error}") from None


def _pipeline(model: ModelSpec, kinds: tuple[str, ...]) -> str | None:
    """The pipeline that takes these kinds of images with the parts of a model; None for none of them."""
    family = family_for(model)
    if model.pipeline in family.edits:
        if kinds != ("image",):
            raise UsageError(
                f"{model.name} ({model.pipeline}) changes images, so it takes an image a prompt, and nothing else: "
                "give --image, or --prompts with a column 'image'"
            )
        return model.pipeline
    if not kinds:
        return None
    pipeline = _takers(model.family, model.pipeline).get(kinds)
    if pipeline is None:
        given = " and ".join(WORDS[kind] for kind in kinds)
        others = [name for name, spec in registered_models().items() if kinds in _takers(spec.family, spec.pipeline)]
        raise UsageError(
            f"{model.name} does not take {given}, as there is no such pipeline for a {model.pipeline}; "
            f"{', '.join(others) or 'none of the models'} do"
        )
    return pipeline


def _takers(family: str, pipeline: str) -> Mapping[tuple[str, ...], str]:
    """The pipelines that have the parts of one and take images, by the kinds of these; with `image`, editing ones."""
    known = families()[family]
    own = {("image",): pipeline} if pipeline in known.edits else {}
    return {**known.imaged.get(pipeline, {}), **own}


def _controlnet(typed: Options, wanted: bool, pipeline: str) -> ControlNet | None:
    if not wanted:
        if typed.controlnet is not None:
            raise UsageError("--controlnet without a control image: give --control, or a column 'control'")
        return None
    if typed.controlnet is None:
        raise UsageError("a control image without a ControlNet: name one by --controlnet, a folder or a Hub id")
    return ControlNet.find(typed.controlnet, pipeline)


def _strength(given: float | None, parameters: Mapping[str, Any], pipeline: str, steps: int) -> dict[str, float]:
    """The argument for the share of the steps that run; UsageError for one that leaves none."""
    if STRENGTH not in parameters:
        if given is not None:
            raise UsageError(f"--strength {given:g}: a {pipeline} takes none, it goes through all steps")
        return {}
    strength = parameters[STRENGTH].default if given is None else given
    if not 0 < strength <= 1:
        raise UsageError(f"--strength {strength:g} is no share of the steps: it is above 0, and 1 at most")
    if int(steps * strength) < 1:
        raise UsageError(
            f"--strength {strength:g} of {steps} steps leaves none to run: give {1 / steps:.2g} at least, or more "
            "--steps"
        )
    return {STRENGTH: strength}


def _repeated(paths: Sequence[Path], count: int) -> tuple[Path, ...]:
    return tuple(islice(cycle(paths), count))


def _pictures(
    listed: Iterable[Mapping[str, Sequence[Path]]], size: tuple[int, int]
) -> tuple[dict[tuple[str, Path], FilePicture], str | None]:
    """Every image by its kind and file, and a line on those of another size; UsageError for what is no image."""
    found: dict[tuple[str, Path], FilePicture] = {}
    others: dict[Path, tuple[int, int]] = {}
    try:
        for of_prompts in listed:
            for image, mask in (
                zip(of_prompts["image"], of_prompts["mask"], strict=True) if "mask" in of_prompts else ()
            ):
                if image_size(image) != image_size(mask):
                    raise UsageError(f"{mask} is {_text(image_size(mask))} and its image {image} "
                                     f"{_text(image_size(image))}: a mask has the size of its image")  # fmt: skip
            for kind, path in ((kind, path) for kind, paths in of_prompts.items() for path in paths):
                if (kind, path) not in found:
                    found[kind, path] = FilePicture(path, size, MASK if kind == "mask" else RGB)
                    if (own := image_size(path)) != size:
                        others[path] = own
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(str(error)) from None
    if not others:
        return found, None
    shown = ", ".join(f"{path.name} of {_text(own)}" for path, own in list(others.items())[:SHOWN])
    more = ", ..." if len(others) > SHOWN else ""
    count = len({path for _, path in found})
    return found, (
        f"input images: {len(others)} of {count} are cut about their centre and resized to {_text(size)} "
        f"({shown}{more})"
    )


def _text(size: tuple[int, int]) -> str:
    return "x".join(map(str, size))
