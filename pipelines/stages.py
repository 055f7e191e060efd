"""The commands: a whole run, and each of its stages alone on folders."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from dmquant.errors import UserError
from dmquant.evaluation.generate import missing, prune, read_prompt
from dmquant.evaluation.grid import draw_grid
from dmquant.evaluation.images import generated_images
from dmquant.evaluation.report import write_report
from dmquant.pipelines import folders, runfolder
from dmquant.pipelines.console import Console, quiet_libraries
from dmquant.pipelines.hashes import pipeline_hashes
from dmquant.pipelines.loading import checked_folder, load_full_precision, resolve_device
from dmquant.pipelines.reporting import (
    build_report,
    closing_table,
    comparison_table,
    metrics_table,
    unfinished,
)
from dmquant.pipelines.run import Run
from dmquant.pipelines.runfolder import RunFolder, claim, fingerprint, is_full_disk
from dmquant.pipelines.settings import Settings, resolve_metrics
from dmquant.pipelines.work import load_quantized, make_images, make_model, make_scores


def run(settings: Settings, out: Path, overwrite: bool) -> None:
    """Take a model from full precision to a quantized, compared and scored folder, or from where that stopped."""
    quiet_libraries()
    console = Console()
    source = checked_folder(settings.model, console.say)
    with (
        claim(out, settings.model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        _explaining_a_full_disk(out),
    ):
        Run(settings, source, folder, console).finish()


def compare(settings: Mapping[str, Settings], out: Path, overwrite: bool) -> None:
    """Quantize a model by several recipes and compare all with the same images, or from where that stopped."""
    from dmquant.pipelines.compare import Comparison  # brings matplotlib, which no other command needs

    quiet_libraries()
    console = Console()
    model = next(iter(settings.values())).model
    source = checked_folder(model, console.say)
    with (
        claim(out, model.name, overwrite) as folder,
        console.logging_to(out / runfolder.LOG),
        _explaining_a_full_disk(out),
    ):
        Comparison(settings, source, folder, console).finish()


def quantize(settings: Settings, out: Path, overwrite: bool) -> None:
    """Write the quantized pipeline of a model to the folder `out`, without making images.

    What calibration has done so far is kept beside it until the pipeline is written, so that a command that was
    killed continues there when it is given again.
    """
    quiet_libraries()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / folders.INDEX).is_file():
            raise UserError(f"{out} holds something else than a pipeline; choose another folder with --out")
        if not overwrite:
            raise UserError(f"{out} already holds a pipeline; choose another folder with --out, or add --overwrite")
    console = Console()
    with _explaining_a_full_disk(out):
        pipeline = load_full_precision(settings.model, settings.dtype, settings.device, console.say)
        workspace = out.with_name(f"{out.name}.{runfolder.CALIBRATION}")
        make_model(pipeline, settings, out, console, workspace=workspace)
    shutil.rmtree(workspace, ignore_errors=True)
    console.say(f"model: {out}")


def generate(settings: Settings, out: Path) -> None:
    """Make one image a prompt in the folder `out`, with a model at full precision or one that dmquant quantized."""
    quiet_libraries()
    console = Console()
    folder = Path(settings.model.source)
    quantized = folder.is_absolute() and folders.quantization(folder, settings.family.component) is not None
    source = folder if quantized else checked_folder(settings.model, console.say)
    requests = settings.requests(fingerprint(files=pipeline_hashes(source, settings.family.component)))
    prune(out, requests)
    if not missing(out, requests):
        console.say(f"images: all {len(requests)} are in {out}")
        return
    with _explaining_a_full_disk(out):
        pipeline = (
            load_quantized(folder, settings)
            if quantized
            else load_full_precision(settings.model, settings.dtype, settings.device, console.say)
        )
        make_images(pipeline, requests, out, settings, console, "images")


def score(fp: Path, quantized: Path, metrics: str | None, real: Path | None, device: str) -> None:
    """Print the metrics of two folders of images that pair up by name."""
    quiet_libraries()
    console = Console()
    names, device = resolve_metrics(metrics, real), resolve_device(device)
    console.show(metrics_table(*make_scores(fp, quantized, names, real, device, console)))


def grid(fp: Path, quantized: Path, out: Path, rows: int) -> None:
    """Draw image pairs, with the prompts that the images carry, or their names where they carry none."""
    prompts = [read_prompt(path) or path.stem for path in generated_images(fp)]
    Console().say(f"grid: {draw_grid({'full precision': fp, 'quantized': quantized}, prompts, out, rows)}")


def report(folder: Path) -> None:
    """Write the reports of a finished run again."""
    run_folder = RunFolder(folder)
    settings = yaml.safe_load((folder / runfolder.SETTINGS).read_text(encoding="utf-8"))
    absent = unfinished(run_folder, settings)
    if absent:
        raise UserError(f"{folder} is not finished ({', '.join(absent)} not done); run its command again to resume")
    result = build_report(run_folder, settings)
    write_report(folder, result)
    Console().show(comparison_table(result) if "recipes" in settings else closing_table(result))


@contextlib.contextmanager
def _explaining_a_full_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise UserError(
            f"the disk that holds {out} is full: make room and run the same command to resume; what is done stays"
        ) from error
