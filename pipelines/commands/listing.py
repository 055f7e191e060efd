"""Tables on the screen: models, formats, recipes, this machine, and the content of a folder."""

import fnmatch
from pathlib import Path

from torch import nn

from dmquant.convert import plan
from dmquant.diffusers.families import GENERIC, Family, families, family_of_backbone
from dmquant.diffusers.families.generic import COMPONENTS
from dmquant.diffusers.quantizer import PACKED, QuantConfig, QuantMethod
from dmquant.errors import UserError
from dmquant.formats import SHORT_NAMES, get_format, known_formats
from dmquant.host import checksums, weight_file
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.units import about_text, size_text
from dmquant.pipelines.commands import doctor as examination
from dmquant.pipelines.commands import inspecting
from dmquant.pipelines.commands.tables import table as _table
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.opening import is_of_others
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.models.weights import safetensors_files
from dmquant.pipelines.models.whole import check_models
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.defaults import DEFAULT_RECIPE, ENGINES, PURPOSES
from dmquant.recipe import Recipe, bits_names, recipe_names
from dmquant.scaling import BLOCK_FORMATS
from dmquant.settings import format_name

GUIDANCE = {
    "rows": "guidance by rows with and without the prompt in one call",
    "calls": "guidance by a call of its own without the prompt, one row an image",
    "embedded": "guidance as an input, one row an image",
}
MARKS = {"ok": "ok", "warn": "note", "missing": "missing"}


def models() -> None:
    """Print a table of the registered models."""
    table = _table("model", "what it is", "family", "size", "steps", "guidance", "dtype", "download", "licence")
    for spec in registered_models().values():
        download = "none" if spec.is_embedded else about_text(spec.download_bytes)
        table.add_row(
            spec.name,
            spec.description,
            spec.family,
            f"{spec.width}x{spec.height}" + (f", {spec.frames} frames" if spec.frames > 1 else ""),
            str(spec.steps),
            f"{spec.guidance:g}",
            spec.dtype,
            download,
            spec.license or "",
        )
    console = Console()
    console.show(table)
    console.say("A Hub id or a local diffusers folder works too, if its pipeline is one of:")
    console.say(", ".join(sorted(name for family in families().values() for name in family.pipelines)))
    console.say(f"--family {GENERIC} takes any other text-to-image pipeline, with recipes that need no calibration.")


def formats() -> None:
    """Print a table of the number formats, then of the block formats."""
    short = {full: name for name, full in SHORT_NAMES.items()}
    table = _table("format", "short", "bits", "values", "largest", "smallest above 0")
    for name in known_formats():
        fmt = get_format(name)
        table.add_row(
            fmt.name,
            short.get(fmt.name, ""),
            str(fmt.bits),
            str(len(fmt.values)),
            f"{fmt.max:g}",
            f"{fmt.min_positive:g}",
        )
    blocks = _table("block format", "format", "scale of", "scale stored as")
    for name, block in BLOCK_FORMATS.items():
        blocks.add_row(name, get_format(block.format).name, str(block.granularity), block.store)
    console = Console()
    console.show(table)
    console.show(blocks)
    console.say("Any fpN_eXmY with N = 1 + X + Y up to 8 works too; none (or bf16) leaves a tensor alone.")


def recipes() -> None:
    """Print a table of the recipes that come with the package."""
    table = _table("recipe", "data", "rounding", "weights", "activations", "granularity", "scale rule", "what it does")
    for name in [*recipe_names(), *bits_names()]:
        recipe = Recipe.load(name)
        table.add_row(
            name,
            "calibrated" if recipe.calibrated else "data-free",
            recipe.rounding.method,
            _formats(recipe.weights, recipe.candidates),
            format_name(recipe.activations),
            recipe.granularity,
            recipe.scale,
            recipe.description,
        )
    console = Console()
    console.show(table)
    console.say(f"--recipe is {DEFAULT_RECIPE} unless named. --w and --a set the formats of any of them.")
    told = [f"--for {what} is --recipe {recipe}" for what, recipe in PURPOSES.items() if what not in ENGINES]
    console.say(", ".join(told) + f"; --for ENGINE is --recipe for-ENGINE: {', '.join(ENGINES)}.")
    console.say("A YAML file with the same keys is a recipe too.")


def _formats(weights: str, candidates: list[str] | None) -> str:
    """The format of the weights, or those that calibration chooses from."""
    return " or ".join(candidates) if candidates else format_name(weights)


def doctor() -> None:
    """Print a table of the checks of this machine."""
    quiet_libraries()
    table = _table("", "check", "found", "what to do")
    for check in examination.examine():
        table.add_row(MARKS[check.status], check.name, check.detail, check.remedy)
    Console().show(table)


def inspect(folder: Path, layers: bool) -> None:
    """The parts of a pipeline folder (or of the model in a run folder), their bytes, and what its backbone is.

    A weight file, or the folder of a component, is taken for a backbone. Raises UserError for a folder that holds
    neither, or is not whole, and for files in no format that is known.
    """
    quiet_libraries()
    if folder.is_file() or (folder.is_dir() and not runfolder.is_run(folder) and inspecting.is_component(folder)):
        inspecting.inspect_file(folder, layers)
        return
    folder = model_folder(folder)
    pipeline = folders.pipeline_class(folder)
    folders.check_whole(folder)
    component = next((name for name in COMPONENTS if name in folders.components(folder)), None)
    backbones = () if component is None else _backbones(folder, component)
    methods = {name: folders.quantization(folder, name) for name in backbones}
    of_others = [
        name for name in backbones if methods[name] != QuantMethod.DMQUANT.value and is_of_others(folder / name)
    ]
    check_models(folder, of_others)
    console = Console()
    parts = _table("part", "files", "size")
    for name in folders.components(folder):
        files = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
        parts.add_row(name, str(len(files)), size_text(sum(path.stat().st_size for path in files)))
    console.say(f"{folder}: {pipeline}")
    console.show(parts)
    if component is None:
        console.say(f"no {' or '.join(COMPONENTS)} in it")
    for name in backbones:
        _inspect_backbone(folder / name, methods[name], name in of_others, layers, console)


def _backbones(folder: Path, component: str) -> list[str]:
    """Names of the backbones in a pipeline folder, of which `component` is the first."""
    family = family_of_backbone(folders.read_json(folder / component / "config.json").get("_class_name"))
    return [component] if family is None else family.backbones_among(folders.components(folder))


def _inspect_backbone(part: Path, method: str | None, of_others: bool, layers: bool, console: Console) -> None:
    backbone = folders.read_json(part / "config.json").get("_class_name")
    family = family_of_backbone(backbone)
    known = (
        f"no family knows it, --family {GENERIC} fits"
        if family is None
        else f"family {family.name}, {GUIDANCE[family.guidance]}"
    )
    console.say(f"{part.name}: {backbone}, {known}")
    if method == QuantMethod.DMQUANT.value:
        _inspect_quantized(part, layers, console)
    elif of_others or method is not None:
        console.say(f"{part.name}: quantized by {method or 'others'}")
        inspecting.inspect_file(part, layers)
    else:
        _inspect_full_precision(part, family, console)


def verify(folder: Path) -> None:
    """Read every file of a model folder (or of the model in a run folder) and name those that are not what was saved.

    Raises UserError where there are such files, and for a folder without checksums.json.
    """
    folder = model_folder(folder)
    if not (folder / checksums.NAME).exists():
        raise UserError(
            f"{folder} has no {checksums.NAME} to verify it by: dmquant after 0.2 writes it when it saves a model; "
            "without --verify the folder's tensors are compared with its configurations"
        )
    console, faults = Console(), checksums.faults(folder)
    for fault in faults:
        console.say(fault)
    files = checksums.recorded(folder)
    if faults:
        count = f"{len(faults)} place{'s' if len(faults) > 1 else ''}"
        if all(fault.endswith(checksums.ADDED) for fault in faults):
            raise UserError(f"{folder} holds more than was saved, in {count}: move away what should not be in it")
        raise UserError(f"{folder} is not what was saved, in {count}: get those files again")
    tensors = sum(len(entry.get("tensors", ())) for entry in files.values())
    console.say(f"{folder} is what was saved: {len(files)} files, {tensors} tensors")


def model_folder(folder: Path) -> Path:
    """The pipeline folder that is meant: itself, or the model of a run."""
    if (folder / runfolder.RECIPES).is_dir():
        raise UserError(f"{folder} compares several models: name one, {folder / runfolder.RECIPES}/NAME/model")
    if runfolder.is_run(folder):
        if not (folder / runfolder.MODEL).is_dir():
            raise UserError(f"{folder} is a run without a model: it was not finished, or is of a file that was there")
        folder = folder / runfolder.MODEL
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder" if folder.exists() else f"there is no {folder}")
    return folder


def _inspect_full_precision(folder: Path, family: Family | None, console: Console) -> None:
    """Print the layers that stay in high precision when a backbone is quantized, and why."""
    backbone = skeleton(folder)
    layers = {name: each for name, each in backbone.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    keep = (family or families()[GENERIC]).known(backbone).keep
    table = _table("kept in high precision", "layers", "weights", "why")
    for glob, why in keep.items():
        kept = fnmatch.filter(layers, glob)
        if kept:
            table.add_row(glob, str(len(kept)), f"{sum(layers[name].weight.numel() for name in kept):,}", why)
    weights = sum(layer.weight.numel() for layer in layers.values())
    console.say(f"{folder.name}: full precision, {len(layers)} layers with {weights:,} weights")
    console.show(table)


def _inspect_quantized(folder: Path, layers: bool, console: Console) -> None:
    """Print the layers of a backbone by the recipe in its config.json, and the content of its files."""
    recipe = QuantConfig.from_dict(folders.read_json(folder / "config.json")["quantization_config"]).recipe
    backbone = skeleton(folder)
    plans = plan(backbone, recipe)
    sizes = _tensor_bytes(folder)
    packed_of = {}
    for step in plans:
        parts = [*PACKED, *(f"{one.name}_{part}" for one in step.transforms for part in one.parts())]
        packed_of[step.name] = sum(sizes.get(f"{step.name}.{part}", 0) for part in parts)
    packed = sum(packed_of.values())
    weights = sum(backbone.get_submodule(step.name).weight.numel() for step in plans)
    console.say(
        f"{folder.name}: recipe {recipe.name}, weights {format_name(recipe.weights)}, "
        f"activations {format_name(recipe.activations)}, {len(plans)} layers; "
        f"{8 * packed / weights:.3f} bits a quantized weight; {size_text(packed)} packed, "
        f"{size_text(sum(sizes.values()) - packed)} in high precision"
    )
    if layers:
        table = _table("layer", "weights", "granularity", "scale", "activations", "size")
        for step in plans:
            activations = "none" if step.activations is None else step.activations.fmt.name
            table.add_row(
                step.name,
                step.weights.fmt.name,
                str(step.weights.granularity),
                f"{step.weights.scale}, {step.weights.store}",
                activations,
                size_text(packed_of[step.name]),
            )
        console.show(table)


def _tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in a component's safetensors files, by name; reads the headers only."""
    headers = [weight_file.header(path) for path in safetensors_files(folder)]
    return {name: each.end - each.begin for header in headers for name, each in header.items()}
