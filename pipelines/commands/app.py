"""The `dmquant` command. Each subcommand is a few lines over `dmquant.pipelines`.

Nothing heavy is imported at the top: torch and diffusers are imported inside the commands, so that `--help` is instant.
"""

import functools
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.errors import UserError
from dmquant.pipelines.commands.options import (
    COMPARE,
    GENERATE,
    QUANTIZE,
    RUN,
    SWEEP,
    ActivationBits,
    Bits,
    Clip,
    Device,
    DryRun,
    Engine,
    Everything,
    Formats,
    KeepImages,
    Metrics,
    Model,
    Overwrite,
    Prompts,
    Real,
    Techniques,
    Threads,
    WeightBits,
    Workers,
    takes,
)

STOPPED = 130  # what a shell expects of a program ended by Ctrl-C; a batch system's SIGTERM is taken as one
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


def _typed() -> str:
    """The command as one would type it again."""
    return shlex.join(["dmquant", *(argument for argument in sys.argv[1:] if argument != "--debug")])


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
@takes(RUN)
def run(
    model: Model,
    *,
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
    **given: Any,
) -> None:
    """Quantize MODEL and compare it with full precision: images, scores, a report, and a folder diffusers loads.

    The same command on the same folder resumes: what is done is not done again.
    """
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings

    resolved = settings.resolve(settings.Options(model=model, command=_typed(), **given))
    stages.run(resolved, out or Path("runs") / resolved.folder_name, overwrite)


@command(
    "dmquant compare emoji-pixart --recipes rtn,w4a6,w8a8",
    "dmquant compare pixart-sigma --recipes rtn:int4:int8,rtn:fp4:fp8,mine.yaml --device cuda --out runs/int-or-float",
)
@takes(COMPARE)
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
    *,
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
    **given: Any,
) -> None:
    """Quantize MODEL by several recipes and compare all with the same full-precision images: one table, one picture.

    The same command on the same folder resumes; with another recipe in the list, only that one is done.
    """
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings

    resolved = settings.resolve_all(
        settings.Options(model=model, command=_typed(), **given),
        recipes,
    )
    common = next(iter(resolved.values()))
    stages.compare(resolved, out or Path("runs") / f"{common.model.name}-compare", overwrite)


@command(
    "dmquant sweep emoji-pixart --dry-run    (how many trials are there?)",
    "dmquant sweep emoji-pixart --bits 4-6 --num-prompts 16",
    "dmquant sweep emoji-pixart --bits 4 --a-bits 4-8,16 --techniques rtn,default",
    "dmquant sweep emoji-sd --formats fp4_e2m1,fp6,fp8,int4,int8 --all --workers 2 --metrics psnr,latent_mse,fid_fp",
    "dmquant sweep pixart-sigma --bits 4,8 --engine ray --workers 16 --device cuda --out /shared/sweep",
)
@takes(SWEEP)
def sweep(
    model: Model,
    *,
    bits: Bits = "3-8",
    w_bits: WeightBits = None,
    a_bits: ActivationBits = None,
    formats: Formats = None,
    techniques: Techniques = "rtn",
    everything: Everything = False,
    dry_run: DryRun = False,
    workers: Workers = None,
    threads: Threads = None,
    engine: Engine = "local",
    keep_images: KeepImages = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of the sweep. Default: runs/MODEL-sweep.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Try MODEL in many formats of weights and activations, with and without techniques: quality against cost.

    Cost is bits a weight, bit operations, and the area of a multiply-accumulate by a gate-count model. The same command
    on the same folder resumes; with a wider space only what is new is done.
    """
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings
    from dmquant.pipelines.sweep import engines, space

    engines.check_engine(engine)
    chosen = space.Choice(bits, w_bits, a_bits, formats, techniques, everything)
    trials = space.design_space(settings.Options(model=model, command=_typed(), **given), chosen)
    if dry_run:
        stages.list_trials(trials)
        return
    folder = out or Path("runs") / f"{trials.trials[0].settings.model.name}-sweep"
    stages.sweep(trials, folder, overwrite, engine, workers, threads, keep_images)


@command(
    "dmquant quantize emoji-pixart --w fp4 --a fp6 --out model",
    "dmquant quantize PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --recipe w4a16 --out pixart-w4",
)
@takes(QUANTIZE)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes.", rich_help_panel="Output")],
    *,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Quantize MODEL and save it as a diffusers pipeline folder; no images, no scores.

    Steps, guidance and size are those of the pipeline runs that calibration learns from.
    """
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings

    resolved = settings.resolve(settings.Options(model=model, **given))
    stages.quantize(resolved, out, overwrite)


@command(
    "dmquant generate emoji-pixart --num-prompts 16 --out images/fp",
    "dmquant generate runs/emoji-pixart-w4a6/model --prompts prompts.txt --out images/quantized",
)
@takes(GENERATE)
def generate(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.", rich_help_panel="Output")],
    **given: Any,
) -> None:
    """Generate one image a prompt with MODEL, at full precision or quantized; images already there are kept."""
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings

    # Nothing is quantized here; settings hold a recipe all the same, and this one goes with every family.
    resolved = settings.resolve(settings.Options(model=model, recipe="rtn", **given))
    stages.generate(resolved, out)


FullPrecisionImages = Annotated[Path, typer.Argument(metavar="FP_DIR", help="Images at full precision, 00000.png ...")]
QuantizedImages = Annotated[Path, typer.Argument(metavar="Q_DIR", help="Images of the quantized model, same names.")]


@command(
    "dmquant score images/fp images/quantized",
    "dmquant score images/fp images/quantized --metrics psnr,fid_real --real photos/",
    "dmquant score images/fp images/quantized --metrics clip_score,hpsv2 --clip ViT-B-32:openai --csv scores.csv",
)
def score(
    fp: FullPrecisionImages,
    quantized: QuantizedImages,
    metrics: Metrics = None,
    real: Real = None,
    prompts: Prompts = None,
    clip: Clip = None,
    device: Device = "auto",
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the scores of every image to it.", rich_help_panel="Output"),
    ] = None,
) -> None:
    """Score two folders of images that pair up by file name.

    Images that dmquant made carry their prompts; for others --prompts gives one an image, in the order of the names.
    """
    from dmquant.pipelines.commands import stages

    stages.score(fp, quantized, metrics, real, prompts, clip, device, csv)


@command(
    "dmquant grid images/fp images/quantized --out grid.png",
    "dmquant grid images/fp images/quantized --worst --rows 8",
    "dmquant grid images/fp runs/c/recipes/*/images/quantized --no-difference",
)
def grid(
    fp: FullPrecisionImages,
    quantized: Annotated[
        list[Path], typer.Argument(metavar="Q_DIR...", help="Images of one quantized model or several, same names.")
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The picture to write.", rich_help_panel="Output")] = Path(
        "grid.png"
    ),
    rows: Annotated[int, typer.Option(min=1, help="Prompts to show, spread over all.", rich_help_panel="Output")] = 12,
    worst: Annotated[
        bool, typer.Option("--worst", help="Show those furthest from full precision.", rich_help_panel="Output")
    ] = False,
    difference: Annotated[
        bool, typer.Option(help="Show the difference to full precision as well.", rich_help_panel="Output")
    ] = True,
    amplify: Annotated[
        float, typer.Option(min=0.1, help="Times the difference is shown.", rich_help_panel="Output")
    ] = 4.0,
    columns: Annotated[
        int | None,
        typer.Option(
            min=1, max=12, help="Prompts beside one another. Default: as many as fit.", rich_help_panel="Output"
        ),
    ] = None,
) -> None:
    """Draw images side by side: full precision, quantized ones, and their difference."""
    from dmquant.pipelines.commands import stages

    stages.grid(fp, quantized, out, rows, worst, amplify if difference else None, columns)


@command("dmquant report runs/emoji-pixart-w4a6")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
) -> None:
    """Write report.md, report.html and report.json of a run again, and print its table."""
    from dmquant.pipelines.commands import stages

    stages.report(folder)


@command("dmquant inspect runs/emoji-pixart-w4a6/model", "dmquant inspect runs/emoji-pixart-w4a6/model --layers")
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A diffusers pipeline folder, or a run folder.")],
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer.")] = False,
) -> None:
    """Show what is in a model folder: components, formats, bits a weight, sizes."""
    from dmquant.pipelines.commands import listing

    listing.inspect(folder, layers)


@command("dmquant models")
def models() -> None:
    """List the registered models, their sizes and default settings."""
    from dmquant.pipelines.commands import listing

    listing.models()


@command("dmquant formats")
def formats() -> None:
    """List the number formats with their bits, largest and smallest values."""
    from dmquant.pipelines.commands import listing

    listing.formats()


@command("dmquant recipes")
def recipes() -> None:
    """List the shipped recipes and what each does."""
    from dmquant.pipelines.commands import listing

    listing.recipes()


@command("dmquant doctor")
def doctor() -> None:
    """Say what this machine can do: devices, weights and metrics at hand, what is missing and how to get it."""
    from dmquant.pipelines.commands import listing

    listing.doctor()


def main() -> None:
    """Entry point; lets `--debug` stand anywhere on the command line."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # half-written files are removed on the way out
    try:
        app(arguments, prog_name="dmquant")
    finally:
        signal.signal(signal.SIGTERM, before)
