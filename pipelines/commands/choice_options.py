"""The options that `dmquant sensitivity` has for itself, and those that ask for a choice of formats."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Choice of formats"
TargetBits = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Bits a quantized weight, scales included: each layer gets the format that costs the images least.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The same for a size of the backbone's file, such as 500MB.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
MinPsnr = Annotated[
    float | None,
    typer.Option(
        metavar="DB",
        help="The smallest model whose images have this PSNR to those of full precision, on the calibration prompts.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
MaxLpips = Annotated[
    float | None,
    typer.Option(
        metavar="DISTANCE",
        help="The same for a mean LPIPS (AlexNet), such as 0.1.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The folder of `dmquant sensitivity`, whose costs are taken. Default: measured now, in the run folder.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
StudyFormats = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Formats of weights to look at, comma separated, such as fp4,fp6. Default: 3.25 to 8.13 bits, or what "
        "the engine of --for runs.",
        rich_help_panel="Costs",
        show_default=False,
    ),
]
StudyPrompts = Annotated[
    int,
    typer.Option(
        "--num-prompts",
        min=1,
        metavar="N",
        help="Calibration prompts that costs are measured on; layers are solved on as many more.",
        rich_help_panel="Costs",
    ),
]
