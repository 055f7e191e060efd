"""The command that writes a quantized model for another engine, with a card of what is known of it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dmquant.errors import UsageError, UserError
from dmquant.evaluation.png import is_picture
from dmquant.evaluation.report.image_grid import draw_grid
from dmquant.exchange import folder as export_folder
from dmquant.exchange.formats import writable
from dmquant.exchange.interfaces import Exported, ForeignFormat
from dmquant.exchange.source import Source
from dmquant.host import owned
from dmquant.host.console import Console, quiet_libraries
from dmquant.host.files import write_text
from dmquant.host.units import size_text
from dmquant.pipelines.commands.listing import model_folder
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.opening import open_foreign, open_source
from dmquant.pipelines.runs.evidence import Evidence, evidence_of
from dmquant.pipelines.runs.evidence_card import MARK, evidence_card
from dmquant.pipelines.runs.importance import data_of, importance_of

PAIRS = 8  # in the picture of the card


def export(folder: Path, to: str, out: Path | None, overwrite: bool, calibration_data: Path | None = None) -> None:
    """Write the quantized model in `folder`, or of a run, in the format `to`; by default in the current folder.

    A format that weighs errors takes them from `calibration_data`, by default the run's.
    """
    quiet_libraries()
    console, target = Console(), writable(to)
    model = model_folder(folder)
    name = folder.resolve().name if folder != model or model.name != "model" else folder.resolve().parent.name
    out = out or Path(f"{name}-{target.name}{'' if target.folder else target.suffix}")
    if not target.folder:
        _check_file(out, model, target)
    if os.path.lexists(out) and not overwrite:
        raise UserError(f"{out} is there already: choose another place with --out, or replace it with --overwrite")
    card, picture = _places(out, target.folder)
    if not target.folder:
        _refuse_strangers(card, picture)
    source = open_source(model)
    if target.weighs_errors is None and calibration_data is not None:
        raise UsageError(f"{target.name} is written without calibration data: leave out --calibration-data")
    if target.weighs_errors is not None and target.weighs_errors(source):
        source.importance = importance_of(source, calibration_data or data_of(folder), console)
    with _place_of(out, target.folder or card.exists()), console.bar(f"export to {target.name}") as bar:
        written = target.export(source, out, bar)
    layers = ", ".join(f"{count} layers in {name}" for name, count in written.formats.items())
    exact = f"weights {'bit for bit' if written.exact else 'near, not bit for bit,'} as dmquant decodes them"
    size = sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*")) if path.is_file())
    console.say(f"{written.path}: {target.title}, {size_text(size)}; {layers}; {exact}")
    for note in written.notes:
        console.say(f"note: {note}")
    if target.folder and (own := _other_own_parts(model, source.component)):
        console.say(f"note: {', '.join(own)} as dmquant quantized it: whoever loads the folder needs dmquant for that")
    evidence = evidence_of(model, source.component)
    _write_card(source, target, written, evidence, card, picture)
    told = evidence if isinstance(evidence, str) else "scores and pairs of its run"
    console.say(f"card: {card}; {told}")


def _other_own_parts(model: Path, backbone: str) -> list[str]:
    parts = [part for part in folders.components(model) if (model / part / "config.json").is_file()]
    return [part for part in parts if part != backbone and folders.quantization(model, part) is not None]


def _check_file(out: Path, model: Path, target: ForeignFormat) -> None:
    """UsageError where a file's name would not tell its format, UserError where it is no file or lies in the model."""
    if out.suffix != target.suffix:
        raise UsageError(f"{target.title} takes files whose names end in {target.suffix}: have --out {out} end so")
    if out.is_dir():
        raise UserError(f"{out} is a folder, and this format is a file: choose another place with --out")
    if model.resolve() in out.resolve().parents:
        raise UserError(f"{out} lies in the model {model}: choose another place with --out")


def _places(out: Path, is_folder: bool) -> tuple[Path, Path]:
    """Where the card and the picture of pairs go: in a folder, or beside a file."""
    if is_folder:
        return out / export_folder.CARD, out / "pairs.png"
    return out.with_suffix(".md"), out.with_suffix(".png")


@contextlib.contextmanager
def _place_of(out: Path, ours: bool) -> Iterator[None]:
    """Move a file that no export wrote, so that it has no card, aside while another takes its place; back if it fails.

    Exports of folders keep account of their files themselves.
    """
    if ours or not os.path.lexists(out):
        yield
        return
    aside = owned.set_aside(out)
    try:
        yield
    except BaseException:
        aside.rename(out)
        raise


def _refuse_strangers(card: Path, picture: Path) -> None:
    """UserError where the card or the picture would take the place of something that no export wrote."""
    if os.path.lexists(card) and not (card.is_file() and MARK.encode() in card.read_bytes()):
        raise UserError(f"{card} is there, and is no card of an export: choose another place with --out")
    if os.path.lexists(picture) and not is_picture(picture):
        raise UserError(f"{picture} is there, and dmquant did not draw it: choose another place with --out")


def _write_card(
    source: Source, target: ForeignFormat, written: Exported, evidence: Evidence | str, card: Path, picture: Path
) -> None:
    drawn = None
    if isinstance(evidence, Evidence):
        columns = {"full precision": evidence.full_precision, evidence.name: evidence.quantized}
        drawn = draw_grid(columns, evidence.report.prompts, picture, rows=PAIRS).name
    elif is_picture(picture):
        picture.unlink()  # of an earlier export
    read = None
    with contextlib.suppress(UserError):
        read = open_foreign(written.path)
    heading = card.read_text("utf-8") if target.folder else f"# {written.path.name}\n"  # a folder's says how to load it
    text = evidence_card(source, target, written, read, evidence, drawn)
    write_text(card, f"{heading.rstrip()}\n\n{text}")
    if target.folder:
        export_folder.rewritten(written.path, [card.name, *([drawn] if drawn else [])])
