"""The command that writes a quantized model for another engine."""

import os
from pathlib import Path

from dmquant.errors import UsageError, UserError
from dmquant.exchange.formats import writable
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.units import size_text
from dmquant.pipelines.commands.listing import model_folder
from dmquant.pipelines.models.opening import open_source
from dmquant.pipelines.runs.importance import data_of, importance_of


def export(folder: Path, to: str, out: Path | None, overwrite: bool, calibration_data: Path | None = None) -> None:
    """Write the quantized model in `folder`, or of a run, in the format `to`; by default in the current folder.

    A format that weighs errors takes them from `calibration_data`, by default the run's.
    """
    quiet_libraries()
    console, target = Console(), writable(to)
    model = model_folder(folder)
    name = folder.resolve().name if folder != model or model.name != "model" else folder.resolve().parent.name
    out = out or Path(f"{name}-{target.name}{'' if target.folder else target.suffix}")
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} is there already: choose another place with --out, or replace it with --overwrite")
    source = open_source(model)
    if target.weighs_errors:
        source.importance = importance_of(source, calibration_data or data_of(folder), console)
    elif calibration_data is not None:
        raise UsageError(f"{target.name} is written without calibration data: leave out --calibration-data")
    with console.bar(f"export to {target.name}") as bar:
        written = target.export(source, out, bar)
    layers = ", ".join(f"{count} layers in {name}" for name, count in written.formats.items())
    exact = "exactly what dmquant computes with" if written.exact else "re-quantized: not what dmquant computes with"
    size = sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file())
    console.say(f"{written.path}: {target.title}, {size_text(size)}; {layers}; {exact}")
    for note in written.notes:
        console.say(f"note: {note}")
