"""The commands that take a model: run, compare, sweep, quantize, generate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dmquant.errors import UsageError
from dmquant.host import names
from dmquant.pipelines.commands.choice_options import (
    Costs,
    MaxLpips,
    MinPsnr,
    StudyFormats,
    StudyPrompts,
    TargetBits,
    TargetSize,
)
from dmquant.pipelines.commands.command import command, typed
from dmquant.pipelines.commands.options import (
    COMPARE,
    GENERATE,
    QUANTIZE,
    RUN,
    SENSITIVITY,
    SWEEP,
    Layout,
    Model,
    Overwrite,
    takes,
)
from dmquant.pipelines.commands.sweep_options import (
    ActivationBits,
    Bits,
    DryRun,
    Engine,
    Everything,
    Formats,
    KeepImages,
    Techniques,
    Threads,
    WeightBits,
    Workers,
)
from dmquant.pipelines.runs.defaults import LAYOUTS, SWEEP_BITS, SWEEP_TECHNIQUES, for_layout


@command(
    "dmquant run emoji-pixart --w fp4 --a fp6",
    "dmquant run emoji-pixart --for speed",
    "dmquant run emoji-pixart --target-bits 4.5    (each layer in the format that costs least)",
    "dmquant run emoji-sd --image photos/ --strength 0.6",
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
    layout: Layout = LAYOUTS[0],
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    min_psnr: MinPsnr = None,
    max_lpips: MaxLpips = None,
    costs: Costs = None,
    **given: Any,
) -> None:
    """Quantize MODEL and compare it with full precision: images, scores, a report, and a folder diffusers loads.

    With a target, formats are chosen by layer, and compared with one format for all of equal size. The same command on
    the same folder resumes: what is done is not done again.
    """
    from dmquant.pipelines.commands import layouts, stages
    from dmquant.pipelines.runs import settings

    if any(value is not None for value in (target_bits, target_size, min_psnr, max_lpips, costs)):
        from dmquant.pipelines.choice.targets import Target
        from dmquant.pipelines.commands import choice_stages

        target = Target.of(target_bits, target_size, min_psnr, max_lpips)
        if target is None:
            raise UsageError("--costs goes with a target: --target-bits, --target-size, --min-psnr or --max-lpips")
        if layout != LAYOUTS[0]:
            raise UsageError(f"--layout {layout} holds one format for all layers: leave it out, or the target")
        resolved = settings.resolve(settings.Options(model=model, command=typed(), **given))
        folder = out or Path("runs") / names.readable(f"{resolved.folder_name}-{target.words}")
        choice_stages.choose(resolved, target, costs, folder, overwrite)
        return
    resolved = settings.resolve(settings.Options(model=model, command=typed(), **for_layout(layout, given)))
    folder = out or Path("runs") / resolved.folder_name
    layouts.check(layout, resolved)
    stages.run(resolved, folder, overwrite)
    layouts.add_to_run(layout, folder)


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
        settings.Options(model=model, command=typed(), **given),
        recipes,
    )
    common = next(iter(resolved.values()))
    stages.compare(resolved, out or Path("runs") / names.readable(f"{common.model.name}-compare"), overwrite)


@command(
    "dmquant sensitivity emoji-pixart",
    "dmquant sensitivity pixart-sigma --formats fp4,fp6,fp8 --device cuda --out runs/costs",
    "dmquant run pixart-sigma --target-bits 4.5 --costs runs/costs --device cuda    (choose by them)",
)
@takes(SENSITIVITY)
def sensitivity(
    model: Model,
    *,
    formats: StudyFormats = None,
    num_prompts: StudyPrompts = 5,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of the study. Default: runs/MODEL-sensitivity.",
            rich_help_panel="Output",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    **given: Any,
) -> None:
    """Measure what quantizing each layer of MODEL, each format and each range of timesteps costs at the final latents.

    It writes a page with a heat map of layers by steps, a table, and a list of layers to leave alone. The same command
    on the same folder resumes.
    """
    from dmquant.pipelines.commands import choice_stages
    from dmquant.pipelines.runs import settings
    from dmquant.settings import format_name

    resolved = settings.resolve(settings.Options(model=model, command=typed(), **given))
    folder = out or Path("runs") / names.readable(f"{resolved.model.name}-sensitivity")
    listed = None if formats is None else [format_name(name.strip()) for name in formats.split(",") if name.strip()]
    choice_stages.sensitivity(resolved, folder, overwrite, listed, num_prompts)


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
    bits: Bits = SWEEP_BITS,
    w_bits: WeightBits = None,
    a_bits: ActivationBits = None,
    formats: Formats = None,
    techniques: Techniques = SWEEP_TECHNIQUES,
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
    trials = space.design_space(settings.Options(model=model, command=typed(), **given), chosen)
    if dry_run:
        stages.list_trials(trials)
        return
    folder = out or Path("runs") / names.readable(f"{trials.trials[0].settings.model.name}-sweep")
    stages.sweep(trials, folder, overwrite, engine, workers, threads, keep_images)


@command(
    "dmquant quantize emoji-pixart --w fp4 --a fp6 --out model",
    "dmquant quantize PixArt-alpha/PixArt-Sigma-XL-2-1024-MS --recipe w4a16 --out pixart-w4",
    "dmquant quantize emoji-pixart --layout torchao --out for-anyone",
)
@takes(QUANTIZE)
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model folder goes.", rich_help_panel="Output")],
    *,
    overwrite: Overwrite = False,
    layout: Layout = LAYOUTS[0],
    **given: Any,
) -> None:
    """Quantize MODEL and save it as a diffusers pipeline folder; no images, no scores.

    Steps, guidance and size are those of the pipeline runs that calibration learns from.
    """
    from dmquant.pipelines.commands import layouts
    from dmquant.pipelines.runs import settings

    resolved = settings.resolve(settings.Options(model=model, **for_layout(layout, given)))
    layouts.check(layout, resolved)
    layouts.quantize(layout, resolved, out, overwrite)


@command(
    "dmquant generate emoji-pixart --num-prompts 16 --out images/fp",
    "dmquant generate runs/emoji-pixart-w4a6/model --prompts prompts.txt --out images/quantized",
    "dmquant generate flux-dev --component flux1-dev-nvfp4.safetensors --num-prompts 4 --out images/nvfp4",
)
@takes(GENERATE)
def generate(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.", rich_help_panel="Output")],
    overwrite: Overwrite = False,
    component: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|DIR",
            help="A backbone that others quantized, in the place of MODEL's own, computed as its engine does.",
            rich_help_panel="Model",
            show_default=False,
        ),
    ] = None,
    **given: Any,
) -> None:
    """Generate one image a prompt with MODEL, at full precision or quantized; images already there are kept."""
    from dmquant.pipelines.commands import stages
    from dmquant.pipelines.runs import settings

    # Nothing is quantized here; settings hold a recipe all the same, and rtn goes with every family.
    recipe = "rtn" if component is None else f"file:{component}"
    resolved = settings.resolve(settings.Options(model=model, recipe=recipe, **given))
    stages.generate(resolved, out, overwrite)
