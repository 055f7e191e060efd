"""Model families: what dmquant knows of the backbones of one architecture, each in one module of this package.

To add one, write a module that defines `FAMILY`, and a YAML file in configs/models that names it; or `register` one
from outside.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dmquant.diffusers.autoencoders import kept_of
from dmquant.errors import UsageError, UserError
from dmquant.models import knows_models
from dmquant.recipe import Known

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

GENERIC = "generic"
HOW_TO_ADD = 'docs/models.md, "Adding a family", says how one is added'


def blocks_in(*lists: str) -> "Callable[[nn.Module], list[str]]":
    """Names of all modules in the backbone's module lists of these names, one list after another."""
    return lambda backbone: [f"{name}.{index}" for name in lists for index in range(len(backbone.get_submodule(name)))]


def joint_in(groups: "Mapping[str, Sequence[str]]") -> "Callable[[nn.Module], list[tuple[str, ...]]]":
    """Groups of layers, named in one string, in all modules of the backbone's module lists of these names."""

    def of_backbone(backbone: "nn.Module") -> list[tuple[str, ...]]:
        names = {name for name, _ in backbone.named_modules()}
        found = (
            tuple(full for layer in group.split() if (full := f"{name}.{layer}") in names)
            for blocks, listed in groups.items()
            for name in blocks_in(blocks)(backbone)
            for group in listed
        )
        return [group for group in found if group]

    return of_backbone


IMAGED = {
    ("image",): "Img2Img",
    ("image", "mask"): "Inpaint",
    ("control",): "ControlNet",
    ("image", "control"): "ControlNetImg2Img",
    ("image", "mask", "control"): "ControlNetInpaint",
}
"""What the pipelines of diffusers that take images beside a prompt are called, by the images."""


def imaged(pipeline: str, *kinds: str) -> dict[str, dict[tuple[str, ...], str]]:
    """For `Family.imaged`: those of a pipeline for text alone whose names have one of the `kinds` of IMAGED in them."""
    stem = pipeline.removesuffix("Pipeline")
    return {pipeline: {given: f"{stem}{kind}Pipeline" for given, kind in IMAGED.items() if kind in kinds}}


def first_of_each_patch(features: int, channels: int, first: int) -> "Tensor":
    """Mask of a patch projection's output features: True for the first `first` channels of a pixel; bool (features,).

    A diffusion transformer's features are the pixels of a patch, each with its `channels` channels together.
    """
    import torch

    return torch.arange(features) % channels < first


def ends(backbone: "nn.Module") -> dict[str, str]:
    """The first and the last Linear or Conv2d in the order of the backbone's definition, and why they are kept."""
    from torch import nn

    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return {layers[0]: "the first layer", layers[-1]: "the last layer"} if layers else {}


def _nothing(backbone: "nn.Module") -> dict[str, Any]:
    return {}


def _itself(pipeline: "DiffusionPipeline") -> "DiffusionPipeline":
    return pipeline


@dataclass(frozen=True)
class Family:
    """Facts common to the backbones of one architecture."""

    name: str
    component: str
    """Attribute of the pipeline that is the backbone: `transformer` or `unet`."""
    backbones: tuple[str, ...]
    """Class names of the backbones."""
    pipelines: tuple[str, ...]
    """Class names of the pipelines that dmquant can run from a prompt alone."""
    keep: Mapping[str, str]
    """Globs of layer names inside the backbone that stay in high precision by default, and why."""
    blocks: "Callable[[nn.Module], list[str]]"
    """Names of the backbone's modules that are reconstructed one after another. No two hold the same layer."""
    guidance: Literal["rows", "calls", "embedded"] = "rows"
    """Computation of classifier-free guidance: with and without the prompt as `rows` of one call, as `calls` of their
    own, or `embedded` as an input of a distilled backbone. The last two have one row an image."""
    guidance_argument: str = "guidance_scale"
    """Argument of the pipeline's call that is the scale of guidance."""
    prompt_first: bool = False
    """Whether of the two rows of a call the one with the prompt is the first; in most pipelines it is the second."""
    experts: tuple[str, ...] = ()
    """Attributes of the pipeline that are further backbones, of the class of the first, where a model has them. Each
    computes timesteps of its own, and is quantized and calibrated as the first is."""
    concatenations: "Callable[[nn.Module], dict[str, int]]" = _nothing
    """Layers whose input is the concatenation of a stream and a skip connection, with the channels of the stream. The
    two halves differ in distribution, so each gets scales of its own."""
    counted: "Callable[[nn.Module], dict[str, Tensor]]" = _nothing
    """Layers some of whose output channels the sampler drops (a learned variance): bool, True where one counts."""
    joint: "Callable[[nn.Module], Sequence[tuple[str, ...]]]" = lambda backbone: ()
    """Groups of layers of one input that the architecture's first code has as one layer, and other engines still."""
    shared: tuple[str, ...] = ()
    """Arguments of the backbone's forward that all rows of a call share, so that they have no batch dimension."""
    padded: Mapping[str, str] = field(default_factory=dict)
    """Arguments of the backbone's forward, (rows, tokens, ...), that end in padding to the longest prompt of a call,
    and the mask of each, (rows, tokens), true for what is no padding; None says that nothing is."""
    listed: tuple[str, ...] = ()
    """Arguments of the backbone's forward that are lists of plain values with an entry for each prompt of a call."""
    encoded: "Callable[[DiffusionPipeline, Sequence[str], Mapping[str, Any]], dict[str, Any]] | None" = None
    """Embeddings of prompts of any lengths, all of one length, as arguments of the pipeline's call, whose others are
    given; for calibration, where the pipeline gives the backbone texts of different lengths without a mask."""
    imaged: Mapping[str, Mapping[tuple[str, ...], str]] = field(default_factory=dict)
    """Class names of the pipelines that have the parts of one for text alone, a ControlNet as the case may be, and take
    images: by the class of that one and what is given, as in IMAGED."""
    edits: tuple[str, ...] = ()
    """Class names of the pipelines that change an image as a prompt says, and make none without; one at a time."""
    prompted: "Callable[[DiffusionPipeline], Any]" = _itself
    """The pipeline as something that is called with prompts; itself, unless its call takes something else."""
    without: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the pipeline's constructor that leave parts of it out, used where it has such a parameter."""
    may_lack: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Text encoders and tokenizers that a pipeline of a class may be without, and still takes prompts."""
    token_limits: Mapping[str, int] = field(default_factory=dict)
    """Tokens of each tokenizer, by its name in the pipeline, where the pipeline fixes them and its call has no say."""

    lengths: "Callable[[DiffusionPipeline, str, Sequence[str]], list[int]] | None" = None
    """Tokens of each prompt for a tokenizer, by its name, if nothing were cut, where the pipeline rewrites prompts."""

    keeps_ends: bool = False
    """Whether the first and the last layer stay in high precision as well, whatever they are called."""

    def backbones_of(self, pipeline: "DiffusionPipeline") -> "dict[str, nn.Module]":
        """The backbones that a pipeline has, by name, the first one first."""
        return {name: part for name in self.names if (part := getattr(pipeline, name, None)) is not None}

    def backbones_among(self, parts: Container[str]) -> list[str]:
        """Names of the backbones of a pipeline with these parts, the first one first."""
        return [name for name in self.names if name == self.component or name in parts]

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes of the pipeline that may be backbones."""
        return tuple(dict.fromkeys((self.component, *self.experts)))

    @property
    def prefix(self) -> str:
        """What the names of layers begin with where those of several backbones are listed together."""
        return f"{self.component}." if self.component in self.experts else ""

    @property
    def with_images(self) -> set[str]:
        """Class names of the pipelines of this family that are called with images."""
        return {*self.edits, *(name for others in self.imaged.values() for name in others.values())}

    @property
    def batching(self) -> dict[str, Any]:
        """What `capture` has to know to cut the arguments of the backbone's forward into rows that go together."""
        return {"shared": self.shared, "padded": self.padded, "listed": self.listed, "encoded": self.encoded}

    def known(self, backbone: "nn.Module") -> Known:
        """The meaning of `keep: family` in a recipe for this backbone."""
        keep = {**self.keep, **ends(backbone)} if self.keeps_ends else self.keep
        return Known(keep, self.concatenations(backbone), tuple(self.joint(backbone)))


_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Add a family that is not a module of this package; UsageError where its name or backbone is another's."""
    for other in families().values():
        if other.name == family.name or set(other.backbones) & set(family.backbones):
            raise UsageError(f"family {family.name}: its name or a backbone of its is that of family {other.name}")
    _registered[family.name] = family


@functools.cache
def _own() -> dict[str, Family]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}


def families() -> dict[str, Family]:
    """Every family by name."""
    return _own() | _registered


def family_of_backbone(class_name: str) -> Family | None:
    """The family that knows a backbone of this class, None where none does."""
    return next((family for family in families().values() if class_name in family.backbones), None)


def family_of_pipeline(class_name: str) -> Family | None:
    """The family that runs pipelines of this class, with images or without; None where none does."""
    return next(
        (one for one in families().values() if class_name in one.pipelines or class_name in one.with_images), None
    )


@knows_models
def _known(model: "nn.Module") -> Known | None:
    family = family_of_backbone(type(model).__name__)
    if family is None and (kept := kept_of(model)) is not None:
        return Known(kept)
    if family is None and _is_of_diffusers(model):
        family = families()[GENERIC]
    return None if family is None else family.known(model)


def _is_of_diffusers(model: "nn.Module") -> bool:
    bases = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    return ("diffusers", "ModelMixin") in bases


def family_of(pipeline: "DiffusionPipeline") -> Family:
    """The family of a loaded pipeline's backbone; UserError, naming those that are known, if it has none."""
    for family in families().values():
        backbone = getattr(pipeline, family.component, None)
        if hasattr(backbone, "_orig_mod"):
            raise UserError(f"the {family.component} is compiled: quantize it first, then torch.compile it")
        if type(backbone).__name__ in family.backbones:
            return family
    backbones = {type(getattr(pipeline, name)).__name__ for name in ("transformer", "unet") if hasattr(pipeline, name)}
    known = ", ".join(name for family in families().values() for name in family.backbones)
    found = " and ".join(sorted(backbones)) or "no backbone"
    raise UserError(
        f"{type(pipeline).__name__} has {found}, which no model family knows; known are {known}; {HOW_TO_ADD}"
    )
