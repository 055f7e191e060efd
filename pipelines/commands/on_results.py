"""The commands that look at results, or list models, formats and recipes."""

from pathlib import Path
from typing import Annotated

import typer

from dmquant.pipelines.commands.command import command
from dmquant.pipelines.commands.options import (
    Clip,
    Device,
    Metrics,
    Offload,
    Prompts,
    Real,
)
from dmquant.pipelines.runs.defaults import EXPORTS

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
    offload: Offload = None,
    csv: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the scores of every image to it.", rich_help_panel="Output"),
    ] = None,
) -> None:
    """Score two folders of images that pair up by file name.

    Images that dmquant made carry their prompts; for others --prompts gives one an image, in the order of the names.
    """
    from dmquant.pipelines.commands import stages

    stages.score(fp, quantized, metrics, real, prompts, clip, device, offload, csv)


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
        float, typer.Option(min=0.1, max=255, help="Times the difference is shown.", rich_help_panel="Output")
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


@command(
    "dmquant inspect runs/emoji-pixart-w4a6/model",
    "dmquant inspect runs/emoji-pixart-w4a6/model --layers",
    "dmquant inspect runs/emoji-pixart-w4a6/model --verify",
    "dmquant inspect flux1-dev-nvfp4.safetensors --layers",
)
def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE",
            help="A diffusers pipeline folder, a run folder, or a weight file or folder that others quantized.",
        ),
    ],
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare it with checksums.json; nothing else.")
    ] = False,
) -> None:
    """Show what is in a model folder or a weight file: components, formats, dialect, bits a weight, sizes.

    With --verify, whether a folder is what was saved.
    """
    from dmquant.pipelines.commands import listing

    if verify:
        listing.verify(folder)
    else:
        listing.inspect(folder, layers)


@command(
    "dmquant export runs/emoji-pixart-default --to torchao",
    "dmquant export runs/emoji-pixart-default/model --to comfyui --out emoji-pixart.safetensors",
)
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that dmquant saved, or a run folder.")],
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"The engine's format: {', '.join(EXPORTS)}.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="Where it goes. Default: NAME-FORMAT in the current folder.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel="Output")
    ] = False,
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Calibration data that weighs the errors of what is quantized again. Default: the run's.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a quantized model in the format of another engine, without loss wherever the format can hold it."""
    from dmquant.pipelines.commands import exporting

    exporting.export(folder, to, out, overwrite, calibration_data)


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
