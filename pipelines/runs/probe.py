"""Per-layer output error: the same few backbone calls on both sides, and a sample of the output of every layer.

The calls are the ones that the full-precision pipeline's sampler makes. In them the quantized backbone runs as a whole,
so the error of a layer is accumulated: it contains the errors of the layers before it.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmquant.calib.blocks.replay import Arguments
from dmquant.calib.data.tree import flatten, unflatten
from dmquant.diffusers.calling import backbone_calls, final_latents
from dmquant.diffusers.watching import watching_steps
from dmquant.errors import UserError
from dmquant.evaluation.generate import ImageRequest
from dmquant.evaluation.pictures import opened_inputs
from dmquant.evaluation.result import LayerError
from dmquant.host.console import Console
from dmquant.host.files import fingerprint
from dmquant.host.sealed import load_sealed, save_sealed
from dmquant.layers import QUANTIZED
from dmquant.pipelines.runs.footprint import footprint
from dmquant.pipelines.runs.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

CALLS = 4
SAMPLE = 4096
"""Elements of one output that are looked at: the relative error of that many independent ones is known to 2 %."""
PROMPTS = 2
FILE = "fp.safetensors"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Probe:
    """Backbone calls of a full-precision pipeline, and by layer a sample of its outputs in all of them; on the CPU."""

    calls: list[Arguments]
    outputs: dict[str, Tensor]

    def save(self, path: Path, key: str) -> None:
        """Write one file, whole or not at all; `key` stands for everything that the probe depends on."""
        skeleton, leaves = flatten(self.calls)
        tensors = {f"argument.{index}": leaf.tensor.clone() for index, leaf in enumerate(leaves)}
        tensors |= {f"output.{index}": output for index, output in enumerate(self.outputs.values())}
        save_sealed(path, tensors, {"key": key, "calls": skeleton, "layers": list(self.outputs)})

    @classmethod
    def load(cls, path: Path, key: str) -> "Probe | None":
        """The probe of that key as it was saved; None where there is none, or a damaged one."""
        tensors, about = load_sealed(path) or ({}, {})
        if about.get("key") != key:
            return None
        names = about["layers"]
        outputs = {name: tensors[f"output.{index}"] for index, name in enumerate(names)}
        arguments = [tensors[f"argument.{index}"] for index in range(len(tensors) - len(names))]
        return cls(unflatten(about["calls"], arguments), outputs)


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
    `requests` belong to the full-precision images; `load` loads their pipeline, and is called only where the probe
    has to be made. Raises UserError as `make_probe` does.
    """
    path, key = folder / f"{settings.family.prefix}{FILE}", probe_key(requests, settings)
    probe = Probe.load(path, key)
    if probe is not None:
        return probe
    with console.bar("outputs of the layers at full precision") as bar:
        probe = make_probe(
            settings.prompted(load()),
            settings.family.component,
            [request.prompt for request in _probed(requests, settings)],
            seed=settings.seed,
            call=settings.call | opened_inputs([request.inputs for request in _probed(requests, settings)]),
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
    formats: Mapping[str, tuple[str, float]] | None = None,
) -> list[LayerError]:
    """The errors of each layer of a quantized pipeline, in the order of the backbone.

    `weight_errors` are the relative squared errors of the weights by layer, as `make_model` reports them;
    `formats` the format and the bits a weight of each, where the layers are not of dmquant.
    """
    backbone = getattr(pipeline, settings.family.component)
    with console.bar("outputs of the quantized layers") as bar:
        outputs = output_errors(backbone, probe, bar, None if formats is None else list(formats))
    kinds = {name: _kind(backbone.get_submodule(name)) for name in outputs}
    formats = formats or {name: _format(backbone.get_submodule(name)) for name in outputs}
    listed = {name: f"{settings.family.prefix}{name}" for name in outputs}
    return [
        LayerError(full, kinds[name], *formats[name], weight_errors[full], outputs[name])
        for name, full in listed.items()
    ]


def _probed(requests: Sequence[ImageRequest], settings: Settings) -> Sequence[ImageRequest]:
    return requests[: min(PROMPTS, settings.batch_size)]


def _kind(layer: nn.Module) -> str:
    return next((plain.__name__ for plain in QUANTIZED if isinstance(layer, plain)), type(layer).__name__)


def _format(layer: nn.Module) -> tuple[str, float]:
    return layer.weight_spec.fmt.name, footprint(layer).bits_per_weight


def make_probe(
    pipeline: Any,
    component: str,
    prompts: Sequence[str],
    *,
    seed: int,
    call: dict[str, Any],
    progress: Progress = lambda done, total: None,
) -> Probe:
    """The probe of a full-precision pipeline: one run of its sampler, then its chosen backbone calls once more.

    Args:
        component: attribute of the pipeline that is the backbone.
        prompts: one batch; prompt i starts from the noise of seed `seed` + i.
        call: arguments of the pipeline's call other than prompt, generator and output type.
        progress: told after every step of the sampler, and every repeated call, how many are done of how many.

    Raises UserError where the backbone is never called, or with arguments that cannot be kept, and where the call takes
    no number of steps.
    """
    if "num_inference_steps" not in call:
        raise UserError(f"a {type(pipeline).__name__} takes no num_inference_steps: its steps are not known beforehand")
    backbone = getattr(pipeline, component)
    steps = backbone_calls(pipeline, call["num_inference_steps"], call.get("strength"))
    chosen = _spread(steps)
    total = steps + len(chosen)
    recorder = _Recorder(chosen, lambda done: progress(done, total))
    handle = backbone.register_forward_pre_hook(recorder.record, with_kwargs=True)
    try:
        with watching_steps(pipeline, recorder.count):
            final_latents(pipeline, prompts, seed, call)
    finally:
        handle.remove()
    if not recorder.calls:
        raise UserError(f"the pipeline never called its {type(backbone).__name__}: its layers cannot be compared")
    calls, names = list(recorder.calls.values()), layer_names(backbone, QUANTIZED)
    return Probe(calls, sampled_outputs(backbone, calls, names, lambda done, _: progress(steps + done, total)))


def output_errors(
    backbone: nn.Module,
    probe: Probe,
    progress: Progress = lambda done, total: None,
    names: Sequence[str] | None = None,
) -> dict[str, float | None]:
    """Sum of |q - fp|^2 over sum of |fp|^2 of the outputs of the layers, in the order in which they run.

    The layers are those that dmquant quantized, or the ones named.

    None for a layer that the calls do not reach (those come last), for one whose output at full precision is zero, and
    for one with NaN or infinity in its output.
    """
    names = layer_names(backbone, QUANTIZED.values()) if names is None else names
    outputs = sampled_outputs(backbone, probe.calls, names, progress)
    order = dict.fromkeys([*outputs, *names])
    return {name: _relative_error(outputs.get(name), probe.outputs.get(name)) for name in order}


def layer_names(backbone: nn.Module, kinds: Container[type]) -> list[str]:
    """Names of the modules that are exactly of one of the `kinds`."""
    return [name for name, module in backbone.named_modules() if type(module) in kinds]


def sampled_outputs(
    backbone: nn.Module,
    calls: Sequence[Arguments],
    names: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> dict[str, Tensor]:
    """At most `SAMPLE` elements a call of what each named layer gives, in one row, in the order in which they run.

    Layers that are never reached are left out. Positions depend on the size of the output alone, so two backbones of
    one shape are sampled at the same.
    """
    device = next(backbone.parameters()).device
    taken: dict[str, list[Tensor]] = {}
    with _watching_outputs(backbone, names, taken), torch.inference_mode():
        for done, (args, kwargs) in enumerate(calls, start=1):
            skeleton, leaves = flatten([args, kwargs])
            args, kwargs = unflatten(skeleton, [leaf.tensor.to(device, copy=True) for leaf in leaves])
            backbone(*args, **kwargs)
            progress(done, len(calls))
    return {name: torch.cat(samples) for name, samples in taken.items()}


@contextlib.contextmanager
def _watching_outputs(backbone: nn.Module, names: Sequence[str], taken: dict[str, list[Tensor]]) -> Iterator[None]:
    """Add samples of the outputs of the layers to `taken` until the block ends; nothing else of them is kept."""

    def watch(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        def take(layer: nn.Module, args: tuple, output: Tensor) -> None:
            positions = _positions(output.numel()).to(output.device)
            taken.setdefault(name, []).append(output.take(positions).cpu())

        return take

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(backbone.get_submodule(name).register_forward_hook(watch(name)).remove)
        yield


class _Recorder:
    """Keeps the arguments of the first backbone call of each chosen step of the sampler."""

    def __init__(self, chosen: Sequence[int], progress: Callable[[int], None]):
        self.calls: dict[int, Arguments] = {}
        self._chosen, self._progress, self._step = frozenset(chosen), progress, 0

    def record(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._step in self._chosen and self._step not in self.calls:
            skeleton, leaves = flatten([args, kwargs])
            kept = [leaf.tensor.to("cpu", copy=True, memory_format=torch.contiguous_format) for leaf in leaves]
            self.calls[self._step] = unflatten(skeleton, kept)

    def count(self, timestep: float, latents: Tensor) -> None:
        self._step += 1
        self._progress(self._step)


def _spread(steps: int) -> list[int]:
    """The first, the last and evenly spread steps between them, at most `CALLS`."""
    return sorted({round(index * (steps - 1) / (CALLS - 1)) for index in range(CALLS)})


@functools.cache
def _positions(count: int) -> Tensor:
    """At most `SAMPLE` of `count` positions: a seeded random one in each of as many equal parts."""
    if count <= SAMPLE:
        return torch.arange(count)
    within = torch.rand(SAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((torch.arange(SAMPLE) + within) * (count / SAMPLE)).long().clamp(max=count - 1)


def _relative_error(quantized: Tensor | None, exact: Tensor | None) -> float | None:
    if quantized is None or exact is None:
        return None
    lost = (quantized.double() - exact.double()).square().sum().item()
    power = exact.double().square().sum().item()
    return lost / power if power and math.isfinite(lost) and math.isfinite(power) else None
