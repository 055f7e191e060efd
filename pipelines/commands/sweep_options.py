"""The options that `dmquant sweep` has for itself."""

from typing import Annotated

import typer

Bits = Annotated[
    str,
    typer.Option(
        metavar="BITS", help="Bits of weights and activations: 3-8, 4 or 4,6,8.", rich_help_panel="Design space"
    ),
]
WeightBits = Annotated[
    str | None,
    typer.Option(
        metavar="BITS", help="Bits of the weights, where they differ from --bits.", rich_help_panel="Design space"
    ),
]
ActivationBits = Annotated[
    str | None,
    typer.Option(
        metavar="BITS",
        help="Bits of the activations, where they differ from --bits; 16 leaves them alone.",
        rich_help_panel="Design space",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="Formats of these bits to take, comma separated: fp, int, or names such as fp4_e2m1,int4. "
        "Default: every split of exponent and mantissa, and INT.",
        rich_help_panel="Design space",
    ),
]
Techniques = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Recipes to try each pair of formats with, comma separated: names (see: dmquant recipes) or YAML "
        "files. rtn is without any technique.",
        rich_help_panel="Design space",
    ),
]
Everything = Annotated[
    bool,
    typer.Option(
        "--all",
        help="Every format of the weights with every one of the activations. By default only those of one kind "
        "meet, FP or INT, and activations have no fewer bits than weights.",
        rich_help_panel="Design space",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="List the trials, and do none.", rich_help_panel="Design space")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Trials at once. Default: one a GPU, one on a CPU.",
        rich_help_panel="Machine",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Threads of a trial. Default: those of this machine, shared out. With equal threads results are equal "
        "to the bit, whatever the engine and the number of workers.",
        rich_help_panel="Machine",
        show_default=False,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="local|ray",
        help="Processes of this machine, or a Ray cluster whose machines all see --out under one path "
        "(pip install 'dmquant[ray]').",
        rich_help_panel="Machine",
    ),
]
KeepImages = Annotated[
    bool,
    typer.Option("--keep-images", help="Keep the images of every trial.", rich_help_panel="Output"),
]
