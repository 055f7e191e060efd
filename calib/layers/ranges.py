"""Static activation scales: observe each layer's input in each range of timesteps, and fit a scale to it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmquant.activations import SCHEDULE, ActivationSpec, TimestepRanges
from dmquant.calib.data.watching import Run, Watchers, run_watched
from dmquant.errors import UserError
from dmquant.formats import Format
from dmquant.layers import QuantConv2d, QuantLinear
from dmquant.scaling import STORES

if TYPE_CHECKING:
    from dmquant.calib.data.store import CalibrationStore

_CHANNEL_DIM = {nn.Linear: QuantLinear.channel_dim, nn.Conv2d: QuantConv2d.channel_dim}
CLIPS = tuple(2.0 ** (-step / 8) for step in range(25))  # multiples of absmax that are tried, from 1 down to 1/8

# A histogram's bins are the bfloat16 values of 2^-20 to 2^16.
_FIRST_BIN, _BINS = (127 - 20) << 7, 36 << 7


@torch.inference_mode()
def observe_ranges(
    backbone: nn.Module,
    layers: dict[str, ActivationSpec],
    store: "CalibrationStore",
    batch_size: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    clip: bool = True,
) -> dict[str, Tensor]:
    """Input scales of the layers with static specs, as `quantize_layer` takes them: float32, in their `scale_shape`.

    Runs the full-precision backbone over the samples that are not held out, `batch_size` at a time, on its own device.
    The largest magnitude of a range becomes the largest value of the format (of a static base: its largest value under
    the largest stored scale). With `clip` and granularity `tensor`, a
    multiple of the magnitude takes its place, the one of CLIPS with the least squared error. A range without samples
    takes the scales of the nearest range with some; a channel or half that was always zero takes the largest scale of
    its range.

    `progress(done, total)` counts samples. Raises UserError, with the layer's name, for activations that are not
    finite and layers that no sample reached, and for a store without samples to learn from, or whose timesteps are not
    those of a schedule 0..SCHEDULE.
    """
    static = {name: spec for name, spec in layers.items() if spec.ranges is not None}
    if all(sample.held_out for sample in store.samples):
        raise UserError("the calibration data has no samples to learn from: calibrate with more prompts")
    if any(spec.ranges > 1 for spec in static.values()):
        check_timesteps(store)
    timesteps = TimestepRanges(spec.ranges for spec in static.values())

    def run(watchers: Watchers) -> None:
        run_watched(backbone, watchers, store, batch_size, timesteps.set, progress)

    return scales_seen(backbone, static, timesteps, run, clip)


@torch.inference_mode()
def scales_seen(
    backbone: nn.Module,
    static: Mapping[str, ActivationSpec],
    timesteps: TimestepRanges,
    run: Run,
    clip: bool = True,
) -> dict[str, Tensor]:
    """`observe_ranges` on inputs that `run` shows to watchers, same shapes; `run` sets the `timesteps` of a call."""
    observers = {
        name: RangeObserver(name, spec, backbone.get_submodule(name), timesteps, clip) for name, spec in static.items()
    }
    run(observers)
    return {name: observer.scale() for name, observer in observers.items()}


class RangeObserver:
    """A forward pre-hook that keeps the largest magnitudes of a layer's input, and histograms of it for clipping, in
    each timestep range. `timesteps` has the ranges of the rows of the current call."""

    def __init__(
        self,
        name: str,
        spec: ActivationSpec,
        layer: nn.Linear | nn.Conv2d,
        timesteps: TimestepRanges,
        clip: bool = True,
    ):
        self.name, self.spec, self.dim, self.timesteps = name, spec, _CHANNEL_DIM[type(layer)], timesteps
        self.device = layer.weight.device
        channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        self.segments = spec.segments(channels)
        self.absmax = torch.zeros(spec.scale_shape(channels), dtype=torch.float32)
        self.seen = torch.zeros(spec.ranges, dtype=torch.bool)
        clipped = clip and spec.granularity.kind == "tensor"
        self.histograms = torch.zeros(*self.absmax.shape, _BINS, dtype=torch.int64) if clipped else None

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        of_rows = self.timesteps.of_rows[self.spec.ranges].tolist()
        x, rows = args[0].movedim(self.dim, -1), len(of_rows)
        if len(x) % rows:
            raise RuntimeError(f"layer {self.name}: {tuple(x.shape)} does not divide into the {rows} rows of the call")
        scales = self.absmax.shape[1] // len(self.segments)
        parts = [part.reshape(rows, -1, scales).abs() for part in x.split(self.segments, -1)]
        largest = torch.cat([part.amax(1) for part in parts], 1).float().cpu()
        if not largest.isfinite().all():
            raise UserError(f"the input of layer {self.name} holds NaN or infinity: calibrate in --dtype fp32 or bf16")
        for row, index in enumerate(of_rows):
            self.seen[index] = True
            self.absmax[index] = self.absmax[index].maximum(largest[row])
            if self.histograms is not None:
                self.histograms[index] += torch.stack([histogram(part[row]) for part in parts]).cpu()

    def scale(self) -> Tensor:
        """Scales of all ranges, seen or not, float32 in the spec's `scale_shape`, on the layer's device."""
        if not self.seen.any():
            raise UserError(f"no calibration sample reached layer {self.name}: it cannot have static activation scales")
        amplitude = self.absmax
        if self.histograms is not None:
            flat = least_error_amplitude(self.histograms.flatten(0, 1), amplitude.view(-1, 1), self.spec.fmt)
            amplitude = flat.view_as(amplitude)
        amplitude = amplitude[nearest_seen(self.seen)]
        amplitude = torch.where(amplitude > 0, amplitude, amplitude.amax(-1, keepdim=True))
        if self.spec.static_base:
            return STORES[self.spec.store].fit_base(amplitude, self.spec.fmt).to(self.device)
        return STORES["fp32"].encode(amplitude, self.spec.fmt, None).to(self.device)


def scale_times(scale: Tensor, spec: ActivationSpec, absmax: Tensor, factor: Tensor) -> Tensor:
    """Static scales of an input whose channels are multiplied by `factor`, clipped as much as before; same shape.

    `scale` is float32 in the spec's `scale_shape`; `absmax`, the largest magnitudes before, and `factor` (channels,).
    """
    if spec.granularity.kind == "channel":
        return scale * factor
    segments = spec.segments(len(factor))
    before, after = (
        torch.stack([part.amax() for part in each.split(segments)]).clamp(min=1e-30)
        for each in (absmax, absmax * factor)
    )
    return scale * (after / before)


def nearest_seen(seen: Tensor) -> Tensor:
    """The index of the nearest range with samples for each range, int64 (ranges,), on the CPU.

    `seen` is bool (ranges,), at least one True; between two ranges at the same distance the lower is taken.
    """
    numbers = seen.cpu().nonzero().flatten()
    return numbers[(torch.arange(len(seen)).unsqueeze(-1) - numbers).abs().argmin(-1)]


def histogram(magnitudes: Tensor) -> Tensor:
    """Histogram of magnitudes, any shape and float dtype, over the bfloat16 values of 2^-20 to 2^16; int64 (bins,)."""
    codes = magnitudes.bfloat16().view(torch.int16).flatten().int()
    return torch.bincount((codes - _FIRST_BIN).clamp(0, _BINS - 1), minlength=_BINS)


def least_error_amplitude(histograms: Tensor, absmax: Tensor, fmt: Format) -> Tensor:
    """The multiple of `absmax` (ranges, 1) that clips and rounds with the least squared error; same shape.

    `histograms` (ranges, bins) int64 count the magnitudes.
    """
    values = torch.arange(_FIRST_BIN, _FIRST_BIN + _BINS, dtype=torch.int16).view(torch.bfloat16).float()
    amplitudes = absmax * torch.tensor(CLIPS, dtype=torch.float32)  # ranges, clips
    scales = STORES["fp32"].encode(amplitudes, fmt, None)
    errors = [
        ((fmt.round(values / scale.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(values)).square_() @ counts.float())
        for scale, counts in zip(scales, histograms, strict=True)
    ]
    return amplitudes.gather(1, torch.stack(errors).argmin(-1, keepdim=True))


def check_timesteps(store: "CalibrationStore") -> None:
    """Raise UserError for a model whose timesteps are not those of 0..SCHEDULE but, say, from 0 to 1."""
    latest = max(store.timesteps)
    if not 1 < latest <= SCHEDULE:
        raise UserError(
            f"this model's timesteps go up to {latest:g} and not {SCHEDULE:g}, so they cannot be cut into ranges: "
            "use activation scales online or static:1, and bias and smooth with ranges: 1"
        )
