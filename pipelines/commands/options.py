"""The arguments and options that several commands share, and how a command takes many of them at once."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.pipelines.commands.picture_options import ControlNet, Controls, Masks, Pictures, Strength
from dmquant.pipelines.runs.defaults import DEFAULT_RECIPE, ENGINES, LAYOUTS, PURPOSES

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A registered name (see: dmquant models), a Hub id, or a local diffusers folder.",
        show_default=False,
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="What the backbone is taken for, instead of what the pipeline's class says: a name, or a Python file "
        "(dmquant draft-family); generic fits any, without calibration.",
        rich_help_panel="Model",
    ),
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="FILE[:SCALE]",
        help="A LoRA to fuse into the full-precision model first, safetensors or a folder; may be given several times.",
        rich_help_panel="Model",
    ),
]
SourceQuantized = Annotated[
    str,
    typer.Option(
        metavar="refuse|dequantize",
        help="What becomes of a model that is quantized already: dequantize takes what its weights stand for as full "
        "precision. What they lost stays lost.",
        rich_help_panel="Model",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help=f"How to quantize: a name (see: dmquant recipes) or a YAML file.  [default: {DEFAULT_RECIPE}]",
        rich_help_panel="Quantization",
    ),
]
Purpose = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="WHAT",
        help="In place of --recipe, what matters most: "
        + ", ".join(f"{what} takes {recipe}" for what, recipe in PURPOSES.items() if what not in ENGINES)
        + f"; or the engine that will run the model (see: dmquant export): {', '.join(ENGINES)}.",
        rich_help_panel="Quantization",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--w",
        metavar="FMT",
        help="Format of the weights, such as fp4, fp6_e2m3, int8, mxfp4; none leaves them alone. "
        "Default: the recipe's.",
        rich_help_panel="Quantization",
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--a",
        metavar="FMT",
        help="Format of the activations; none leaves them alone. Default: the recipe's.",
        rich_help_panel="Quantization",
    ),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME=RECIPE",
        help="Another part of the pipeline to quantize, and how, without data: text_encoder=w8a16. May be repeated.",
        rich_help_panel="Quantization",
        show_default=False,
    ),
]
CalibrationPrompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="Prompts to calibrate with, as for --prompts; the recipe says how many. Default: the model's own list.",
        rich_help_panel="Calibration",
    ),
]
CalibrationData = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Calibration data to use, or to make and keep there for other recipes. Default: made for this folder.",
        rich_help_panel="Calibration",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for calibration beside the model, such as 8GB; what does not fit goes to disk. "
        "Changes nothing in the result. Default: what it takes.",
        rich_help_panel="Calibration",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME",
        help="A .txt, .csv, .tsv, .json, .jsonl, .yaml or .parquet file (FILE:COLUMN names a column), COCO captions, "
        "HPSv2's benchmark folder, vbench, or a shipped list. Default: the model's own list.",
        rich_help_panel="Images",
    ),
]
NumPrompts = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many prompts, from the top of the list, one image each. Default: 64, or all of a shorter list.",
        rich_help_panel="Images",
    ),
]
PromptSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Draw the prompts from the whole list with this seed instead of taking the first.",
        rich_help_panel="Images",
    ),
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps an image. Default: the model's.", rich_help_panel="Images")
]
Guidance = Annotated[
    float | None,
    typer.Option(min=0.0, help="Classifier-free guidance scale. Default: the model's.", rich_help_panel="Images"),
]
Height = Annotated[
    int | None,
    typer.Option(min=8, help="Image height in pixels, used as given. Default: the model's.", rich_help_panel="Images"),
]
Width = Annotated[
    int | None,
    typer.Option(min=8, help="Image width in pixels, used as given. Default: the model's.", rich_help_panel="Images"),
]
Frames = Annotated[
    int | None,
    typer.Option(
        min=1, help="Frames of a video, for models that make videos. Default: the model's.", rich_help_panel="Images"
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, help="Image i starts from the noise of seed SEED + i.", rich_help_panel="Images")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images made at once. Default: by size, 16 at 64x64 and 1 at 1024x1024.", rich_help_panel="Images"
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="Make an image to the bit as it would be alone, whatever else is in its batch; batches save no time then.",
        rich_help_panel="Images",
    ),
]
_METRICS = "Metrics, comma separated, or all: {metrics}."  # help.py fills in what other packages may add to
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help=_METRICS + " Default: {default_metrics}.",
        rich_help_panel="Scores",
    ),
]
SweepMetrics = Annotated[
    str,
    typer.Option(metavar="LIST", help=_METRICS + " The first is drawn against the costs.", rich_help_panel="Scores"),
]
Clip = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|DIR",
        help="CLIP model of clip_score and CMMD: MODEL:WEIGHTS as open_clip calls them, hf-hub:ORG/NAME, or a local "
        "open_clip folder. Default: the model's own, or ViT-L-14-336:openai.",
        rich_help_panel="Scores",
    ),
]
Real = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help="Folder of real images, for FID, KID and CMMD against them.", rich_help_panel="Scores"
    ),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.", rich_help_panel="Machine")]
Offload = Annotated[
    str | None,
    typer.Option(
        metavar="model|group",
        help="For a GPU that is too small. model: each part of the pipeline is on it only while it runs, and the "
        "backbone while it is quantized. group: a block of the backbone at a time, and a layer of any other part. In "
        "both, one network that scores at a time.",
        rich_help_panel="Machine",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|fp16|fp32",
        help="Precision of what is not quantized. Default: the model's.",
        rich_help_panel="Machine",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Start anew in that folder: what dmquant wrote there is replaced, other files stay.",
        rich_help_panel="Output",
    ),
]
Layout = Annotated[
    str,
    typer.Option(
        metavar="|".join(LAYOUTS),
        help="How the model folder is written: diffusers loads torchao's without dmquant, where torchao is installed. "
        "It brings --for torchao --a none with it.",
        rich_help_panel="Output",
    ),
]

_MODEL = {"family": (Family, None)}
_SOURCE = {"loras": (Loras, None), "source_quantized": (SourceQuantized, "refuse")}
_RECIPE = {"recipe": (Recipe, None), "purpose": (Purpose, None)}
_CALIBRATION = {
    "calibration_prompts": (CalibrationPrompts, None),
    "calibration_data": (CalibrationData, None),
    "memory_budget": (MemoryBudget, None),
}
_FORMATS = {"w": (Weights, None), "a": (Activations, None), "components": (Components, None)}
_PROMPTS = {"prompts": (Prompts, None), "num_prompts": (NumPrompts, None), "prompt_seed": (PromptSeed, None)}
_SIZE = {"height": (Height, None), "width": (Width, None), "frames": (Frames, None)}
_SAMPLING = {"steps": (Steps, None), "guidance": (Guidance, None)} | _SIZE
_INPUTS = {
    "image": (Pictures, None),
    "mask": (Masks, None),
    "control": (Controls, None),
    "controlnet": (ControlNet, None),
    "strength": (Strength, None),
}
_NOISE = {"seed": (Seed, 0), "batch_size": (BatchSize, None), "deterministic": (Deterministic, False)}
_SCORES = {"metrics": (Metrics, None), "real": (Real, None), "clip": (Clip, None)}
_MACHINE = {"device": (Device, "auto"), "offload": (Offload, None), "dtype": (Dtype, None)}

# Fields of pipelines.settings.Options by command, in the order in which --help lists them.
GENERATE = _MODEL | _PROMPTS | _INPUTS | _SAMPLING | _NOISE | _MACHINE
COMPARE = _MODEL | _SOURCE | _FORMATS | _CALIBRATION | _PROMPTS | _INPUTS | _SAMPLING | _NOISE | _SCORES | _MACHINE
RUN = _MODEL | _SOURCE | _RECIPE | COMPARE
SWEEP = _MODEL | _SOURCE | _CALIBRATION | _PROMPTS | _SAMPLING | _NOISE | _SCORES | _MACHINE
SWEEP["metrics"] = (SweepMetrics, "psnr,latent_mse")
SENSITIVITY = (
    _MODEL
    | _SOURCE
    | _RECIPE
    | {"w": (Weights, None), "a": (Activations, None)}
    | {"calibration_prompts": (CalibrationPrompts, None), "memory_budget": (MemoryBudget, None)}
    | _SAMPLING
    | {"batch_size": (BatchSize, None), "device": (Device, "auto"), "dtype": (Dtype, None)}
)
QUANTIZE = _MODEL | _SOURCE | _RECIPE | _FORMATS | _CALIBRATION | _INPUTS | _SAMPLING | _MACHINE


def takes(shared: dict[str, tuple[Any, Any]]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options `shared` (type and default by name), which it receives as keyword arguments.

    They stand in place of the command's own `**given`; typer reads them from the signature.
    """

    def extend(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)

        own = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.name != "given"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, keyword, default=default, annotation=kind)
            for name, (kind, default) in shared.items()
        ]
        before = [parameter for parameter in own if parameter.kind is not keyword]
        after = [parameter for parameter in own if parameter.kind is keyword]
        command.__signature__ = inspect.Signature([*before, *added, *after])
        command.__annotations__ = {name: each.annotation for name, each in command.__signature__.parameters.items()}
        return command

    return extend
