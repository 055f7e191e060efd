"""The commands: a whole run, and each of its stages alone on folders."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmquant.diffusers.quantizer import QuantMethod
from dmquant.errors import UsageError, UserError
from dmquant.evaluation.generate import missing
from dmquant.evaluation.image_files import check_one_kind
from dmquant.evaluation.images import generated_images
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.png import is_picture, read_prompt
from dmquant.evaluation.report.image_grid import draw_grid
from dmquant.evaluation.scores_csv import read_scores
from dmquant.host import owned, processes
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.folder_swap import settle
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import checked_folder, checked_quantized, resolve_device
from dmquant.pipelines.models.placing import GROUP, MODEL, check_offload
from dmquant.pipelines.models.saving import listed
from dmquant.pipelines.prompts.lists import load_prompts
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.closing_tables import closing_table, comparison_tables, metrics_table
from dmquant.pipelines.runs.file_recipe import FileRecipe
from dmquant.pipelines.runs.file_side import put_into
from dmquant.pipelines.runs.image_stage import claim_images, make_images
from dmquant.pipelines.runs.model_stage import load_quantized, load_source, make_model_together
from dmquant.pipelines.runs.run import Run, saved_settings
from dmquant.pipelines.runs.run_report import build_report, reading_records, unfinished, write_all_reports
from dmquant.pipelines.runs.runfolder import RunFolder, claim, is_full_disk
from dmquant.pipelines.runs.scores import make_scores, write_table
from dmquant.pipelines.runs.settings import Settings, clip_source, resolve_metrics
from dmquant.pipelines.runs.source import source_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dmquant.pipelines.runs.tuning import Recovery
    from dmquant.pipelines.sweep.space import Space


def run(settings: Settings, out: Path, overwrite: bool) -> None:
    """Take a model from full precision to a quantized, compared and scored folder, or from where that stopped."""
    quiet_libraries()
    console = Console()
    source = processes.current().on_main(lambda: checked_folder(settings.model, console.say))
    keep_apart(source, out)
    with (
        claim(out, settings.model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        explaining_a_full_disk(out),
    ):
        Run(settings, source, folder, console).finish()


def compare(settings: Mapping[str, Settings], out: Path, overwrite: bool) -> None:
    """Quantize a model by several recipes and compare all with the same images, or from where that stopped."""
    from dmquant.pipelines.runs.compare import Comparison  # brings matplotlib, which no other command needs

    quiet_libraries()
    console = Console()
    model = next(iter(settings.values())).model
    source = processes.current().on_main(lambda: checked_folder(model, console.say))
    keep_apart(source, out)
    with (
        claim(out, model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        explaining_a_full_disk(out),
    ):
        Comparison(settings, source, folder, console).finish()


def sweep(
    space: "Space", out: Path, overwrite: bool, engine: str, workers: int | None, threads: int | None, keep_images: bool
) -> None:
    """Do every trial of a design space and set quality against cost, or from where that stopped."""
    from dmquant.pipelines.sweep.engines import Crew
    from dmquant.pipelines.sweep.sweep import Sweep  # brings matplotlib

    quiet_libraries()
    console, common = Console(), space.trials[0].settings
    source = checked_folder(common.model, console.say)
    keep_apart(source, out)
    with (
        claim(out, common.model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        explaining_a_full_disk(out),
    ):
        crew = Crew.of(workers, threads, common.device)
        Sweep(space, source, folder, console, engine, crew, keep_images).finish()


def list_trials(space: "Space") -> None:
    """Print the trials of a design space, and how many there are."""
    from dmquant.pipelines.sweep.sweep import count_line, left_out_line

    console = Console()
    for trial in space.trials:
        console.say("  ".join((trial.technique, *trial.settings.formats)))
    for line in filter(None, (left_out_line(space), count_line(space))):
        console.say(line)


def quantize(settings: Settings, out: Path, overwrite: bool) -> None:
    """Write the quantized pipeline of a model to the folder `out`, without making images.

    What calibration has done so far is kept beside it until the pipeline is written, so that a command that was
    killed continues there when it is given again.
    """
    if isinstance(settings.recipe, FileRecipe):
        raise UsageError("a file that is quantized already is no recipe to quantize with: `dmquant run` measures it")
    quiet_libraries()
    everyone, console = processes.current(), Console()
    _refuse_own_place(out)
    path = everyone.on_main(lambda: checked_folder(settings.model, console.say))
    keep_apart(path, out)
    if settings.inputs:
        settings.inputs.say(console)

    def load() -> "DiffusionPipeline":
        return load_source(settings, console)

    with contextlib.ExitStack() as held, explaining_a_full_disk(out):
        room = everyone.on_main(lambda: held.enter_context(_place_of_model(out, overwrite)))
        weights = source_of(settings, path, console).key if settings.recipe.calibrated else ""
        make_model_together(load, settings, out, console, room / runfolder.CALIBRATION, weights)
    console.say(f"model: {out}")


def tune(settings: Settings, recovery: "Recovery", out: Path, overwrite: bool) -> None:
    """Let a quantized model learn from full precision, and write its pipeline to the folder `out`.

    What is finished is kept beside it, as `quantize` does.
    """
    from dmquant.pipelines.runs import tuning

    if isinstance(settings.recipe, FileRecipe):
        raise UsageError("a file that is quantized already is no recipe to quantize with: give --recipe a name or YAML")
    if settings.offload == GROUP:
        raise UsageError(f"--offload {GROUP}: gradients go through all of the backbone at once: use --offload {MODEL}")
    quiet_libraries()
    console = Console()
    _refuse_own_place(out)
    path = checked_folder(settings.model, console.say)
    for source in filter(None, (path, recovery.begin)):
        keep_apart(source, out)
    if settings.inputs:
        settings.inputs.say(console)
    with explaining_a_full_disk(out), _place_of_model(out, overwrite) as room:
        tuning.tune(settings, recovery, out, console, room, source_of(settings, path, console).key)
    console.say(f"model: {out}")


@contextlib.contextmanager
def _place_of_model(out: Path, overwrite: bool) -> Iterator[Path]:
    """Hold the place of a model, where there is none yet or one to be replaced; yields its workspace."""
    _refuse_to_replace(out, overwrite)
    with owned.workspace(out) as room:
        settle(out.resolve(), room, listed)
        _refuse_to_replace(out, overwrite)  # what was there when another command held it
        yield room


def _refuse_own_place(out: Path) -> None:
    if Path.cwd().is_relative_to(out.resolve()):
        raise UsageError(f"--out {out} is the folder you are in, or above it: name a new one, such as --out model")


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / folders.INDEX).is_file():
        raise UserError(f"{out} holds something else than a pipeline; choose another folder with --out")
    if not overwrite:
        raise UserError(f"{out} already holds a pipeline; choose another folder with --out, or add --overwrite")
    parts = [name for name in folders.components(out) if (out / name / "config.json").is_file()]
    if not any(folders.quantization(out, name) == QuantMethod.DMQUANT.value for name in parts):
        raise UserError(
            f"{out} holds a pipeline that dmquant did not quantize, which --overwrite does not replace: "
            "choose another folder with --out, or remove it yourself"
        )


def keep_apart(source: Path, out: Path) -> None:
    """UserError where one of the two folders is in the other: what is written to the one would be in the other."""
    source, target = source.resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(
            f"--out {out} and the full-precision model in {source} are one folder, or one in the other: "
            "choose another folder with --out"
        )


def generate(settings: Settings, out: Path, overwrite: bool) -> None:
    """Make one image a prompt in the folder `out`, with a model at full precision or one that dmquant quantized.

    With a file in the place of the recipe, the full-precision model has that as its backbone. Images of ours that are
    there are kept; with `overwrite` those of other settings are replaced or removed.
    """
    quiet_libraries()
    if out.is_file():
        raise UserError(f"{out} is a file; choose another folder with --out")
    console = Console()
    folder = Path(settings.model.source)
    file = settings.recipe if isinstance(settings.recipe, FileRecipe) else None
    quantized = file is None and folder.is_absolute() and folders.quantization(folder, settings.family.component)
    everyone = processes.current()
    source = everyone.on_main(
        lambda: checked_quantized(folder) if quantized else checked_folder(settings.model, console.say)
    )
    keep_apart(source, out)
    if settings.inputs:
        settings.inputs.say(console)
    key = source_of(settings, source, console).key
    requests = settings.requests(key if file is None else settings.model_key(key))
    with claim_images(out, requests, overwrite) as others, explaining_a_full_disk(out):
        if others:
            console.say(f"note: {out} holds {others} more image{'s' if others > 1 else ''} of earlier commands")
        if not everyone.on_main(lambda: missing(out, requests)):
            console.say(f"images: all {len(requests)} are in {out}")
            return
        pipeline = load_quantized(folder, settings) if quantized else load_source(settings, console)
        if file is not None:
            put_into(pipeline, settings.family.component, file.foreign, settings.model.name, console)
        make_images(pipeline, requests, out, settings, console, "images")


def score(
    fp: Path,
    quantized: Path,
    metrics: str | None,
    real: Path | None,
    prompts: str | None,
    clip: str | None,
    device: str,
    offload: str | None,
    csv: Path | None,
) -> None:
    """Print the metrics of two folders of images that pair up by name; those of each image go to the file `csv`."""
    quiet_libraries()
    console = Console()
    _check_folders(fp, quantized)
    if csv is not None and os.path.lexists(csv) and read_scores(csv) is None:
        raise UserError(f"{csv} is there, and is no table of scores: choose another file with --csv")
    names, device = resolve_metrics(metrics, real), resolve_device(device)
    check_offload(offload, device)
    listed = None if prompts is None else load_prompts(prompts)
    networks = Networks(device, clip_source(clip), say=console.say, one_at_a_time=offload is not None)
    scores, reference = processes.current().together(
        lambda: make_scores(fp, quantized, names, real, networks, console, listed)
    )[0]
    console.show(metrics_table(scores, reference))
    if csv is not None:
        shown = tuple(listed or (read_prompt(path) or "" for path in generated_images(quantized)))
        write_table(csv, quantized, shown, {name: metric.values for name, metric in scores.items()})
        console.say(f"scores of each image: {csv}")


def grid(
    fp: Path,
    quantized: Sequence[Path],
    out: Path,
    rows: int,
    worst: bool,
    difference: float | None,
    per_line: int | None,
) -> None:
    """Draw images beside full precision, with the prompts that they carry, or their names where they carry none."""
    _check_folders(fp, *quantized)
    if os.path.lexists(out) and not is_picture(out):
        raise UserError(f"{out} is there, and dmquant did not draw it: choose another file with --out")
    prompts = [read_prompt(path) or path.stem for path in generated_images(fp)]
    names = ["quantized"] if len(quantized) == 1 else _distinct_names(quantized)
    columns = {"full precision": fp, **dict(zip(names, quantized, strict=True))}
    drawn = processes.current().on_main(lambda: draw_grid(columns, prompts, out, rows, difference, worst, per_line))
    Console().say(f"grid: {drawn}")


def _check_folders(fp: Path, *others: Path) -> None:
    """UserError for images that are compared with themselves, and for a folder of which some would be left out."""
    for folder in (fp, *others):
        check_one_kind(folder)
        if folder is not fp and folder.samefile(fp):
            raise UsageError(f"{fp} and {folder} are one folder: name that of the other images")


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as tell all apart."""
    parts = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("the same folder of images is given twice")


def report(folder: Path) -> None:
    """Write the reports of a finished run again."""
    run_folder = RunFolder(folder)
    settings = saved_settings(run_folder)
    if runfolder.TRIALS in settings:
        raise UserError(f"{folder} holds a sweep: its own command, given again, writes its tables again")
    with reading_records(run_folder):
        absent = unfinished(run_folder, settings)
    if absent:
        raise UserError(f"{folder} is not finished ({', '.join(absent)} not done); run its command again to resume")
    result = build_report(run_folder, settings)
    console = Console()
    with owned.claimed(folder):
        processes.current().on_main(lambda: write_all_reports(run_folder, settings, result, console))
    for table in comparison_tables(result) if "recipes" in settings else [closing_table(result)]:
        console.show(table)


@contextlib.contextmanager
def explaining_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"the disk that holds {out} is full: make room and run the same command to resume; what is done stays"
        ) from error
