"""The options that give images beside the prompts."""

from pathlib import Path
from typing import Annotated

import typer

Pictures = Annotated[
    Path | None,
    typer.Option(
        "--image",
        metavar="FILE|FOLDER",
        help="An image to change as the prompt says (image to image), or one for each prompt, in the folder's order "
        "and over again where they are fewer. A .csv or .tsv of prompts may name them in a column 'image', too.",
        rich_help_panel="Input images",
    ),
]
Masks = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        metavar="FILE|FOLDER",
        help="What of --image may change: the white part of a mask of its size (inpainting). Or a column 'mask'.",
        rich_help_panel="Input images",
    ),
]
Controls = Annotated[
    Path | None,
    typer.Option(
        "--control",
        metavar="FILE|FOLDER",
        help="Images that --controlnet reads, as edges or poses. Or a column 'control'.",
        rich_help_panel="Input images",
    ),
]
ControlNet = Annotated[
    str | None,
    typer.Option(
        "--controlnet",
        metavar="SOURCE",
        help="A ControlNet for MODEL, a folder or a Hub id; it stays in full precision.",
        rich_help_panel="Input images",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the steps that run on --image, from 0 to 1: the more, the less is left of it. "
        "Default: the pipeline's.",
        rich_help_panel="Input images",
    ),
]
