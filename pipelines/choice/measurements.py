"""What one change after another costs at the final latents, kept as it is measured."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

from dmquant.activations import ActivationSpec
from dmquant.convert import LayerPlan
from dmquant.host.console import Console
from dmquant.host.files import sealed_json, take_seal, write_text
from dmquant.pipelines.choice.record import RangeCosts, Study
from dmquant.pipelines.choice.subject import Subject

RANGES = 5
INPUTS = ("fp4", "fp6", "fp8", "int8")
FILE = "measured.json"


def measure(subject: Subject, study: Study, console: Console) -> None:
    """Fill in what is measured, one change after another; what an earlier study of the subject measured is kept."""
    file = subject.room / FILE
    known, spans = _known(file), _spans(subject.bench.steps)
    tasks = _changes(subject, spans)
    with console.bar("measuring") as bar:
        for done, (what, change) in enumerate(tasks.items()):
            if what in known:
                continue
            bar(done, len(tasks), what)
            with change():
                known[what] = subject.bench.cost()
            write_text(file, json.dumps(sealed_json({"costs": known})) + "\n")
        bar(len(tasks), len(tasks))
    for name, layer in study.layers.items():
        layer.measured = known[_of_layer(name)]
    study.formats = {one.name: known[what] for one in subject.options if (what := _of_format(one.name)) in known}
    study.inputs = {fmt: known[_of_inputs(fmt)] for fmt in INPUTS}
    study.ranges = [
        RangeCosts(
            first=span[0],
            last=span[-1],
            weights=known[_of_span("weights", span)],
            inputs=known.get(_of_span("inputs", span)),
        )
        for span in spans
    ]


def _changes(subject: Subject, spans: list[range]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """What is measured, by a name for it: contexts in which the subject's backbone is changed."""
    bench, solved, plans = subject.bench, subject.solved, subject.plans
    base, quantized, own = subject.base.name, subject.quantized, subject.inputs
    tasks: dict[str, Callable[[], AbstractContextManager[None]]] = {}
    for name in plans:
        tasks[_of_layer(name)] = lambda name=name: bench.weights(solved.weights([name], base))
    for option in (one.name for one in subject.options):
        if all(option in plans[name] for name in quantized):
            tasks[_of_format(option)] = lambda option=option: bench.weights(solved.weights(quantized, option))
    for fmt in INPUTS:
        specs = {name: ActivationSpec.parse(fmt, _granularity(plans[name][base])) for name in quantized}
        tasks[_of_inputs(fmt)] = lambda specs=specs: bench.inputs(specs)
    for span in spans:
        tasks[_of_span("weights", span)] = lambda span=span: bench.weights(
            solved.weights(quantized, base), span.__contains__
        )
        if own:
            tasks[_of_span("inputs", span)] = lambda span=span: bench.inputs(own, span.__contains__)
    return tasks


def _of_layer(name: str) -> str:
    return f"layer {name}"


def _of_format(option: str) -> str:
    return f"format {option}"


def _of_inputs(fmt: str) -> str:
    return f"inputs {fmt}"


def _of_span(what: str, span: range) -> str:
    return f"{what} in calls {span[0]} to {span[-1]}"


def _spans(steps: int) -> list[range]:
    """RANGES parts of the calls of the backbone, as equal as they can be; fewer where there are fewer calls."""
    edges = [part * steps // RANGES for part in range(RANGES + 1)]
    return [range(first, last) for first, last in pairwise(edges) if first < last]


def _known(file: Path) -> dict[str, float]:
    """What is measured already; nothing where the file is not as it was written."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(content["costs"]) if isinstance(content, dict) and take_seal(content) else {}


def _granularity(step: LayerPlan) -> str:
    """The granularity of inputs that other formats are tried in: the recipe's own, or of tokens."""
    own = step.activations
    return str(own.granularity) if own is not None and own.ranges is None and own.engine is None else "token"
