"""Formats and static scales of the layers' inputs: before the blocks, and again where folding changes an input."""

import functools
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager

from torch import nn

from dmquant.calib.blocks.codes import CodesFolder
from dmquant.calib.blocks.inputs import BlockInputs
from dmquant.calib.blocks.state import LayerState
from dmquant.calib.blocks.streams import Bar
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.activation_formats import choose_activation_formats, formats_of_least_error
from dmquant.calib.layers.ranges import observe_ranges, scales_seen
from dmquant.formats import get_format

OpenBar = Callable[[str], AbstractContextManager[Bar]]


def choose_formats_(
    backbone: nn.Module,
    states: Mapping[str, LayerState],
    store: CalibrationStore,
    batch_size: int,
    codes: CodesFolder,
    number: int,
    bar: OpenBar,
) -> None:
    """Choose among the plans' `activation_candidates`; what is chosen is kept among the codes under this number."""
    plans = {name: state.plan for name, state in states.items() if state.plan.activation_candidates}
    if not plans:
        return
    title = "activation formats"
    if found := codes.load(number, title):
        names = found[1]
    else:
        with bar(title) as shown:
            chosen = choose_activation_formats(backbone, plans, store, batch_size, shown)
        names = {name: fmt.name for name, fmt in chosen.items()}
        codes.save(number, title, {}, names)
    for name in plans:
        states[name].choose_input_format(get_format(names[name]))


def fit_static_scales_(
    backbone: nn.Module, states: Mapping[str, LayerState], store: CalibrationStore, batch_size: int, bar: OpenBar
) -> None:
    """Fit the static scales of inputs."""
    specs = {name: state.plan.activations for name, state in states.items() if state.plan.activations}
    if any(spec.ranges for spec in specs.values()):
        with bar("activation ranges") as shown:
            for name, scale in observe_ranges(backbone, specs, store, batch_size, shown).items():
                states[name].input_scale = scale


def fit_again_(states: Mapping[str, LayerState], folded: Collection[str], inputs: BlockInputs, block: str) -> None:
    """Choose formats and fit static scales anew for layers of this block whose inputs folding has changed."""
    backbone, timesteps = inputs.streams.backbone, inputs.streams.ranges
    run = functools.partial(inputs.run_full_precision, block)
    plans = {name: states[name].plan for name in folded if states[name].plan.activation_candidates}
    if plans:
        for name, fmt in formats_of_least_error(backbone, plans, timesteps, run).items():
            states[name].choose_input_format(fmt)
    specs = {name: spec for name in folded if (spec := states[name].plan.activations) and spec.ranges}
    if specs:
        for name, scale in scales_seen(backbone, specs, timesteps, run).items():
            states[name].input_scale = scale
