"""Which layers hurt: the output of every quantized layer against full precision's, in the same backbone calls."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dmquant.pipelines.runs.probe import Probe, make_probe, output_errors
from dmquant.convert import footprint
from dmquant.evaluation.generate import ImageRequest
from dmquant.evaluation.result import LayerError
from dmquant.layers import QUANTIZED
from dmquant.host.console import Console
from dmquant.pipelines.runs.runfolder import fingerprint
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROMPTS = 2
FILE = "fp.safetensors"
KINDS = {quantized: plain.__name__ for plain, quantized in QUANTIZED.items()}


def probe_key(requests: Sequence[ImageRequest], settings: Settings) -> str:
    """Fingerprint of all that the probe depends on: the keys of images stand for weights, call, dtype and device."""
    return fingerprint(probe=[request.key for request in _probed(requests, settings)])


def probe_full_precision(
    load: Callable[[], "DiffusionPipeline"],
    requests: Sequence[ImageRequest],
    settings: Settings,
    folder: Path,
    console: Console,
) -> Probe:
    """The probe of the full-precision pipeline, from `folder` if it is there.

    It takes the prompts and the noise of the first images of the run, as many as make a batch and at most two.
    `requests` are those of the full-precision images; `load` gives their pipeline, and is called only where the probe
    has to be made. Raises UserError as `calib.probe.make_probe` does.
    """
    path, key = folder / FILE, probe_key(requests, settings)
    probe = Probe.load(path, key)
    if probe is not None:
        return probe
    with console.bar("outputs of the layers at full precision") as bar:
        probe = make_probe(
            settings.family.prompted(load()),
            settings.family.component,
            [request.prompt for request in _probed(requests, settings)],
            seed=settings.seed,
            call=settings.call,
            progress=bar,
        )
    probe.save(path, key)
    return probe


def layer_errors(
    pipeline: "DiffusionPipeline",
    probe: Probe,
    weight_errors: Mapping[str, float],
    settings: Settings,
    console: Console,
) -> list[LayerError]:
    """What quantization did to each layer of a quantized pipeline, in the order of the backbone.

    `weight_errors` are the relative squared errors of the weights by layer, as `quantize_` and calibration report them.
    """
    backbone = getattr(pipeline, settings.family.component)
    with console.bar("outputs of the quantized layers") as bar:
        outputs = output_errors(backbone, probe, bar)
    return [_layer_error(backbone.get_submodule(name), name, weight_errors[name], outputs[name]) for name in outputs]


def _probed(requests: Sequence[ImageRequest], settings: Settings) -> Sequence[ImageRequest]:
    return requests[: min(PROMPTS, settings.batch_size)]


def _layer_error(layer: nn.Module, name: str, weight_error: float, output_error: float | None) -> LayerError:
    kind, fmt = KINDS[type(layer)], layer.weight_spec.fmt.name
    return LayerError(name, kind, fmt, footprint(layer).bits_per_weight, weight_error, output_error)
