"""The command that lets a quantized model learn: tune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.pipelines.commands.command import command, typed
from dmquant.pipelines.commands.options import QUANTIZE, Model, Overwrite, takes

Begin = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="DIR",
        help="A pipeline of MODEL that dmquant quantized, to begin with. Default: MODEL is quantized first, by "
        "--recipe, --w and --a.",
        rich_help_panel="Quantization",
        show_default=False,
    ),
]
Train = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="What learns, comma separated: weights (all codes, by latent weights that are rounded to them), lora "
        "(codes, by a change of low rank), scales (of the weights), biases, norms, kept (the weights of layers in high "
        "precision), branch (that of a recipe with the transform lowrank).",
        rich_help_panel="Tuning",
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        metavar="adamw|qgalore",
        help="How: adamw holds 12 bytes a number; qgalore about 2.6 for weights, in a quarter of their dimensions, and "
        "computes each block twice.",
        rich_help_panel="Tuning",
    ),
]
Iterations = Annotated[
    int, typer.Option(min=1, help="Steps of the optimizer; more are better.", rich_help_panel="Tuning")
]
Minibatch = Annotated[int, typer.Option(min=1, help="Runs of the pipeline a step.", rich_help_panel="Tuning")]
Rate = Annotated[float, typer.Option(help="Factor of all learning rates.", rich_help_panel="Tuning")]
Last = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="How many calls of the backbone at the end of a run are learned; those before are full precision's. Each "
        "takes its time and memory. Default: as many as have 99 % of what moves the image, measured; 8 at most.",
        rich_help_panel="Tuning",
        show_default=False,
    ),
]
TuningPrompts = Annotated[
    int,
    typer.Option(
        min=2,
        help="Runs to learn from, with the prompts of --calibration-prompts, over again with other noise where there "
        "are fewer; a sixteenth of the prompts only judge what is kept.",
        rich_help_panel="Tuning",
    ),
]


@command(
    "dmquant tune emoji-pixart --recipe w3 --calibration-prompts emoji-tuning --tuning-prompts 1000 --out tuned",
    "dmquant tune emoji-pixart --from runs/w3/model --train scales,biases,norms --iterations 200 --out tuned",
    "dmquant tune pixart-sigma --train weights --optimizer qgalore --memory-budget 16GB --device cuda --out tuned",
)
@takes(QUANTIZE)
def tune(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes.", rich_help_panel="Output")],
    *,
    begin: Begin = None,
    train: Train = "scales,biases,norms,kept",
    optimizer: Optimizer = "adamw",
    iterations: Iterations = 1000,
    minibatch: Minibatch = 8,
    rate: Rate = 1.0,
    last: Last = None,
    tuning_prompts: TuningPrompts = 256,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Quantize MODEL and let what is quantized learn from MODEL in full precision: for the fewest bits.

    It learns to end runs of MODEL's own sampler where MODEL ends them, with weights and inputs quantized as they will
    be. What is nearest on prompts that it does not learn from is saved, as a diffusers pipeline folder of the same
    size. It takes minutes to hours where quantizing takes seconds; memory and time are said before it begins. The
    same command on the same folder resumes.
    """
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings
    from dmquant.pipelines.runs.tuning import Recovery

    recovery = Recovery.of(
        train,
        optimizer=optimizer,
        steps=iterations,
        batch_size=minibatch,
        rate=rate,
        prompts=tuning_prompts,
        last=last,
        begin=begin,
    )
    resolved = settings.resolve(settings.Options(model=model, command=typed(), **given))
    stages.tune(resolved, recovery, out, overwrite)
