"""Whether the weights of a file are those of a model: a wrong dialect and a wrong base model are named.

What a file says of itself is not always what its writer did. The decoded weights of some layers are held against the
full-precision ones, and so is every other way to read them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence

from torch import nn

from dmquant.errors import UserError
from dmquant.exchange.applying import Place, float_weight, weight_error
from dmquant.exchange.dialects import Reading, readings
from dmquant.exchange.interfaces import Foreign

LAYERS = 5  # that are looked at, spread over all
UNRELATED = 0.5
"""Squared relative error from which weights are not the model's: 2 bits have 0.1 to 0.2, other weights 2."""
CLEARLY = 4.0  # times nearer than what the file says: a wrong order of block scales costs ten times the error, or more
DIALECTS = {
    ("low first", "linear", "multiplied"): "ModelOpt, torchao and diffusers' bfl",
    ("low first", "linear", "divided"): "compressed-tensors",
    ("high first", "swizzled", "multiplied"): "ComfyUI and Black Forest Labs' own files",
}


def check(foreign: Foreign, found: Sequence[Place], backbone: nn.Module, model: str) -> None:
    """UserError where the weights are not those of the full-precision backbone; it says what they are, if it is known.

    `model` is how the message calls the backbone. Decodes at most `LAYERS` layers.
    """
    step = -(-len(found) // LAYERS)
    sample, path = found[step // 2 :: step] if step else [], foreign.found.path
    as_named, others = [], []
    for place in sample:
        layer, exact = place.layer, float_weight(place, backbone)
        as_named.append(weight_error(place.weight(), exact))
        ways = {} if layer.build is not None else readings(foreign.found, layer.name, layer.shape)
        in_order = place.target.in_order
        others.append({way: weight_error(in_order(decode()), exact) for way, decode in ways.items()})
    error = statistics.median(as_named) if as_named else 0.0
    best, fitting = _best(others)
    if best is not None and fitting < min(UNRELATED, error / CLEARLY):
        raise UserError(
            f"{path} is mislabelled: read as {foreign.format.name} ({_told(foreign)}), its weights are not those of "
            f"{model} (relative squared error {error:.3g}), but with {best} they are ({fitting:.3g}){_whose(best)}: "
            "have it written or named anew in one dialect"
        )
    if not math.isfinite(error):
        raise UserError(f"{path} holds weights that are no finite numbers: get that file again")
    if not error < UNRELATED:
        raise UserError(
            f"{path} does not hold the weights of {model}: their relative squared error is {error:.3g}, the median of "
            f"{len(sample)} layers, and no dialect that is known here fits; weights that have nothing to do with one "
            "another have 2: name its own base model"
        )


def _best(others: Sequence[Mapping[Reading, float]]) -> tuple[Reading | None, float]:
    """The way to read that fits all layers best, and the median of its errors."""
    alike: dict[tuple[bool, ...], list[Mapping[Reading, float]]] = {}
    for each in filter(None, others):
        alike.setdefault(tuple(part is None for part in next(iter(each))), []).append(each)
    most = max(alike.values(), key=len, default=[{}])  # of layers in several formats
    common = set.intersection(*(set(each) for each in most))
    medians = {way: statistics.median(each[way] for each in most) for way in sorted(common, key=str)}
    best = min(medians, key=medians.__getitem__, default=None)
    return best, float("inf") if best is None else medians[best]


def _told(foreign: Foreign) -> str:
    return ", ".join(f"{what} {how}" for what, how in foreign.dialect.items()) or "as its tensors are named"


def _whose(way: Reading) -> str:
    whose = DIALECTS.get((way.nibbles, way.scales, way.globals))
    return f", which is the dialect of {whose}" if whose else ""
