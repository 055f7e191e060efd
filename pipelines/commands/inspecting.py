"""What a weight file, or the folder of a component, is: its format and dialect, its layers, what is left in 16 bit."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from dmquant.exchange.applying import OTHER_PARTS, listed
from dmquant.exchange.architectures import guessed
from dmquant.exchange.interfaces import Foreign, ForeignLayer, Found
from dmquant.exchange.layers import kind_of
from dmquant.host.console import Console
from dmquant.host.units import size_text
from dmquant.pipelines.commands.tables import table
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.opening import find, is_full_precision, open_foreign


def is_component(folder: Path) -> bool:
    """Whether a folder holds weights itself, and is no pipeline."""
    return not (folder / folders.INDEX).is_file() and any(folder.glob("*.safetensors"))


def inspect_file(path: Path, layers: bool) -> None:
    """Print what quantized files are, one row a layer with `layers`; UserError as `open_foreign` raises it."""
    console, found = Console(), find(path)
    if is_full_precision(found):
        console.say(f"{path}: full precision, {_model(found)}; {_counted(found, found.tensors)}")
        return
    foreign = open_foreign(path)
    found = foreign.found
    console.say(f"{path}: {foreign.format.title}, {_model(found)}")
    if foreign.dialect:
        console.say("dialect: " + "; ".join(f"{what}: {how}" for what, how in foreign.dialect.items()))
    console.say(_summary(foreign))
    for note in foreign.notes:
        console.say(f"note: {note}")
    if layers:
        rows = table("layer", "format", "shape", "bits", "input", "size")
        for layer in foreign.layers.values():
            shape = "x".join(map(str, layer.shape))
            rows.add_row(
                layer.name, layer.format, shape, f"{_bits([layer]):.2f}", _input(layer), size_text(layer.nbytes)
            )
        console.show(rows)


def _model(found: Found) -> str:
    """What the files say of their model, or what their names look like."""
    named = found.config.get("_class_name")
    if named:
        return str(named)
    guess = guessed(found.tensors)
    return f"looks like {guess}" if guess else f"no model that is known here ({listed(sorted(found.tensors))})"


def _summary(foreign: Foreign) -> str:
    layers = list(foreign.layers.values())
    if not layers:
        return "no quantized layers in it"
    formats = Counter(layer.format for layer in layers)
    inputs = Counter(map(_input, layers))
    rest = [name for name in foreign.rest if not name.startswith(OTHER_PARTS)]
    others = len(foreign.rest) - len(rest)
    return (
        f"{len(layers)} layers: {_in_layers(formats)}; inputs: {_in_layers(inputs)}; "
        f"{_bits(layers):.3f} bits a quantized weight; {size_text(sum(layer.nbytes for layer in layers))} packed; "
        f"in high precision {_counted(foreign.found, rest)}"
        + (f"; {others} tensors of other parts than the backbone" if others else "")
    )


def _in_layers(counts: Counter[str]) -> str:
    return ", ".join(f"{name} in {count}" for name, count in counts.most_common())


def _counted(found: Found, names: Iterable[str]) -> str:
    tensors = [found.tensors[name] for name in names]
    size = sum(tensor.end - tensor.begin for tensor in tensors)
    dtypes = ", ".join(f"{dtype} in {count}" for dtype, count in Counter(each.dtype for each in tensors).most_common())
    return f"{len(tensors)} tensors of {size_text(size)}" + (f" ({dtypes})" if dtypes else "")


def _bits(layers: Iterable[ForeignLayer]) -> float:
    layers = list(layers)
    return 8 * sum(layer.nbytes for layer in layers) / sum(torch.Size(layer.shape).numel() for layer in layers)


def _input(layer: ForeignLayer) -> str:
    return kind_of(layer.activations) or "not rounded"
