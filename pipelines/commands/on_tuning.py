"""The command that lets a quantized model learn: tune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.pipelines.commands.command import command, typed
from dmquant.pipelines.commands.options import (
    QUANTIZE,
    Begin,
    Iterations,
    Minibatch,
    Model,
    Optimizer,
    Overwrite,
    Rate,
    Train,
    TuningPrompts,
    Weighting,
    takes,
)


@command(
    "dmquant tune emoji-pixart --w int3 --out tuned",
    "dmquant tune emoji-pixart --from runs/w3/model --train scales,biases,norms --iterations 200 --out tuned",
    "dmquant tune pixart-sigma --train weights --optimizer qgalore --memory-budget 16GB --device cuda --out tuned",
)
@takes(QUANTIZE)
def tune(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes.", rich_help_panel="Output")],
    *,
    begin: Begin = None,
    train: Train = "weights,scales,biases,norms,kept",
    optimizer: Optimizer = "adamw",
    iterations: Iterations = 1000,
    minibatch: Minibatch = 16,
    rate: Rate = 1.0,
    weighting: Weighting = "sampler",
    tuning_prompts: TuningPrompts = 256,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Quantize MODEL and let what is quantized learn from MODEL in full precision: for the fewest bits.

    It learns to predict what MODEL predicts in runs of its own sampler, with weights and inputs quantized as they will
    be. What is best on prompts that it does not learn from is saved, as a diffusers pipeline folder of the same size.
    It takes minutes to hours where quantizing takes seconds; memory and time are said before it begins. The same
    command on the same folder resumes.
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
        weighting=weighting,
        begin=begin,
    )
    resolved = settings.resolve(settings.Options(model=model, command=typed(), **given))
    stages.tune(resolved, recovery, out, overwrite)
