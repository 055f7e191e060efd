"""The `dmquant` command. Each subcommand is a few lines over `dmquant.pipelines`.

Nothing heavy is imported at the top: torch and diffusers are imported inside the commands, so that `--help` is instant.
"""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.errors import UserError
from dmquant.pipelines.defaults import DEFAULT_RECIPE

STOPPED = 130  # what a shell expects of a program ended by Ctrl-C
_debug = False

app = typer.Typer(
    name="dmquant",
    help="Quantize a text-to-image diffusion pipeline to FP4, FP6 or FP8, see what it cost, and ship the result.",
    epilog="Start here:  dmquant run emoji-pixart --w fp4 --a fp6\n\n"
    "What is at hand:  dmquant models,  dmquant formats,  dmquant recipes,  dmquant doctor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A registered name (see: dmquant models), a Hub id, or a local diffusers folder.",
        show_default=False,
    ),
]
Recipe = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="How to quantize: a name (see: dmquant recipes) or a YAML file.",
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
        help="A text file with one prompt a line, or the name of a shipped list. Default: the model's own list.",
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
Seed = Annotated[
    int, typer.Option(min=0, help="Image i starts from the noise of seed SEED + i.", rich_help_panel="Images")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images made at once. Default: by size, 16 at 64x64 and 1 at 1024x1024.", rich_help_panel="Images"
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Metrics, comma separated. Default: psnr,ssim,latent_mse,fid_fp, and fid_real with --real.",
        rich_help_panel="Scores",
    ),
]
Real = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of real images, for FID against them.", rich_help_panel="Scores"),
]
Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.", rich_help_panel="Machine")]
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
        help="Replace an earlier run in that folder, or write beside other files.",
        rich_help_panel="Output",
    ),
]


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere on the line.")
    ] = False,
) -> None:
    global _debug
    _debug = debug


def command(*examples: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a subcommand whose errors end as one line and an exit code; `examples` close its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt:
                _fail("stopped; run the same command to resume", STOPPED)
            except UserError as error:
                _fail(f"error: {error}", error.exit_code)
            except Exception as error:
                message = " ".join(str(error).split())
                _fail(f"error: {type(error).__name__}: {message} (rerun with --debug for the traceback)", 1)

        epilog = "\n\n".join(["[bold]Examples[/bold]", *examples])
        return app.command(epilog=epilog)(guarded)

    return register


def _fail(message: str, exit_code: int) -> None:
    if _debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    raise typer.Exit(exit_code)


@command(
    "dmquant run emoji-pixart --w fp4 --a fp6",
    "dmquant run pixart-sigma --w fp4 --a fp6 --num-prompts 256 --device cuda",
    "dmquant run ./my-pipeline --recipe my.yaml --prompts prompts.txt --real photos/ --out runs/mine",
)
def run(
    model: Model,
    recipe: Recipe = DEFAULT_RECIPE,
    w: Weights = None,
    a: Activations = None,
    calibration_prompts: CalibrationPrompts = None,
    calibration_data: CalibrationData = None,
    memory_budget: MemoryBudget = None,
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    metrics: Metrics = None,
    real: Real = None,
    device: Device = "auto",
    dtype: Dtype = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The run folder. Default: runs/MODEL-RECIPE.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize MODEL and compare it with full precision: images, scores, a report, and a folder diffusers loads.

    The same command on the same folder resumes: what is done is not done again.
    """
    from dmquant.pipelines import settings, stages

    resolved = settings.resolve(
        settings.Options(
            model=model,
            recipe=recipe,
            w=w,
            a=a,
            calibration_prompts=calibration_prompts,
            calibration_data=calibration_data,
            memory_budget=memory_budget,
            prompts=prompts,
            num_prompts=num_prompts,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            seed=seed,
            batch_size=batch_size,
            metrics=metrics,
            real=real,
            device=device,
            dtype=dtype,
        )
    )
    stages.run(resolved, out or Path("runs") / resolved.folder_name, overwrite)


@command(
    "dmquant compare emoji-pixart --recipes rtn,w4a6,w8a8",
    "dmquant compare pixart-sigma --recipes rtn:int4:int8,rtn:fp4:fp8,mine.yaml --device cuda --out runs/int-or-float",
)
def compare(
    model: Model,
    recipes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Recipes, comma separated: names or YAML files, each with formats if need be, "
            "as RECIPE:WEIGHTS:ACTIVATIONS.",
            rich_help_panel="Quantization",
        ),
    ],
    w: Weights = None,
    a: Activations = None,
    calibration_prompts: CalibrationPrompts = None,
    calibration_data: CalibrationData = None,
    memory_budget: MemoryBudget = None,
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    metrics: Metrics = None,
    real: Real = None,
    device: Device = "auto",
    dtype: Dtype = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of the comparison. Default: runs/MODEL-compare.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize MODEL by several recipes and compare all with the same full-precision images: one table, one picture.

    The same command on the same folder resumes; with another recipe in the list, only that one is done.
    """
    from dmquant.pipelines import settings, stages

    resolved = settings.resolve_all(
        settings.Options(
            model=model,
            w=w,
            a=a,
            calibration_prompts=calibration_prompts,
            calibration_data=calibration_data,
            memory_budget=memory_budget,
            prompts=prompts,
            num_prompts=num_prompts,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            seed=seed,
            batch_size=batch_size,
            metrics=metrics,
            real=real,
            device=device,
            dtype=dtype,
        ),
        recipes,
    )
    common = next(iter(resolved.values()))
    stages.compare(resolved, out or Path("runs") / f"{common.model.name}-compare", overwrite)


@command(
    "dmquant quantize emoji-pixart --w fp4 --a fp6 --out model",
    "dmquant quantize PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --recipe w4a16 --out pixart-w4",
)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes.", rich_help_panel="Output")],
    recipe: Recipe = DEFAULT_RECIPE,
    w: Weights = None,
    a: Activations = None,
    calibration_prompts: CalibrationPrompts = None,
    calibration_data: CalibrationData = None,
    memory_budget: MemoryBudget = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    device: Device = "auto",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantize MODEL and save it as a diffusers pipeline folder; no images, no scores.

    Steps, guidance and size are those of the pipeline runs that calibration learns from.
    """
    from dmquant.pipelines import settings, stages

    resolved = settings.resolve(
        settings.Options(
            model=model,
            recipe=recipe,
            w=w,
            a=a,
            calibration_prompts=calibration_prompts,
            calibration_data=calibration_data,
            memory_budget=memory_budget,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            device=device,
            dtype=dtype,
        )
    )
    stages.quantize(resolved, out, overwrite)


@command(
    "dmquant generate emoji-pixart --num-prompts 16 --out images/fp",
    "dmquant generate runs/emoji-pixart-w4a6/model --prompts prompts.txt --out images/quantized",
)
def generate(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.", rich_help_panel="Output")],
    prompts: Prompts = None,
    num_prompts: NumPrompts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    device: Device = "auto",
    dtype: Dtype = None,
) -> None:
    """Generate one image a prompt with MODEL, at full precision or quantized; images already there are kept."""
    from dmquant.pipelines import settings, stages

    resolved = settings.resolve(
        settings.Options(
            model=model,
            prompts=prompts,
            num_prompts=num_prompts,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            seed=seed,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
        )
    )
    stages.generate(resolved, out)


FullPrecisionImages = Annotated[Path, typer.Argument(metavar="FP_DIR", help="Images at full precision, 00000.png ...")]
QuantizedImages = Annotated[Path, typer.Argument(metavar="Q_DIR", help="Images of the quantized model, same names.")]


@command(
    "dmquant score images/fp images/quantized",
    "dmquant score images/fp images/quantized --metrics psnr,fid_real --real photos/",
)
def score(
    fp: FullPrecisionImages,
    quantized: QuantizedImages,
    metrics: Metrics = None,
    real: Real = None,
    device: Device = "auto",
) -> None:
    """Score two folders of images that pair up by file name."""
    from dmquant.pipelines import stages

    stages.score(fp, quantized, metrics, real, device)


@command("dmquant grid images/fp images/quantized --out grid.png", "dmquant grid images/fp images/quantized --rows 4")
def grid(
    fp: FullPrecisionImages,
    quantized: QuantizedImages,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.", rich_help_panel="Output")] = Path(
        "grid.png"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Prompts to show, spread over all.", rich_help_panel="Output")] = 12,
) -> None:
    """Draw image pairs side by side: full precision, quantized, and their difference."""
    from dmquant.pipelines import stages

    stages.grid(fp, quantized, out, rows)


@command("dmquant report runs/emoji-pixart-w4a6")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
) -> None:
    """Write report.md, report.html and report.json of a run again, and print its table."""
    from dmquant.pipelines import stages

    stages.report(folder)


@command("dmquant inspect runs/emoji-pixart-w4a6/model", "dmquant inspect runs/emoji-pixart-w4a6/model --layers")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A diffusers pipeline folder, or a run folder.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer.")] = False,
) -> None:
    """Show what is in a model folder: components, formats, bits a weight, sizes."""
    from dmquant.pipelines import listing

    listing.inspect(folder, layers)


@command("dmquant models")
def models() -> None:
    """List the registered models, their sizes and default settings."""
    from dmquant.pipelines import listing

    listing.models()


@command("dmquant formats")
def formats() -> None:
    """List the number formats with their bits, largest and smallest values."""
    from dmquant.pipelines import listing

    listing.formats()


@command("dmquant recipes")
def recipes() -> None:
    """List the shipped recipes and what each does."""
    from dmquant.pipelines import listing

    listing.recipes()


@command("dmquant doctor")
def doctor() -> None:
    """Say what this machine can do: devices, weights and metrics at hand, what is missing and how to get it."""
    from dmquant.pipelines import listing

    listing.doctor()


def main() -> None:
    """Entry point; lets `--debug` stand anywhere on the command line."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    app(arguments, prog_name="dmquant")
