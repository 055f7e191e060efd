"""Static activation scales: what each layer's input looked like in each range of timesteps, and the scale for it."""

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
    The largest magnitude of a range becomes the largest value of the format. With `clip` and granularity `tensor`, it
    is the multiple of it in CLIPS with the least squared error. A range without samples takes the scales of the nearest
    one that has some; a channel or half that was always zero takes the largest scale of its range.

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
    """As `observe_ranges`, by what `run` shows of layers with static specs; it tells `timesteps` those of each call."""
    observers = {
        name: RangeObserver(name, spec, backbone.get_submodule(name), timesteps, clip) for name, spec in static.items()
    }
    run(observers)
    return {name: observer.scale() for name, observer in observers.items()}


class RangeObserver:
    """A forward pre-hook that keeps the largest magnitudes of a layer's input, and histograms of it where they decide
    what to clip, by timestep range. The timesteps are those that `timesteps` was told last."""

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
        self.absmax = torch.zeros(spec.scale_shape(channels))
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
        """Scales of all ranges, those not seen included, float32 in the spec's `scale_shape`, on the layer's device."""
        if not self.seen.any():
            raise UserError(f"no calibration sample reached layer {self.name}: it cannot have static activation scales")
        amplitude = self.absmax
        if self.histograms is not None:
            flat = least_error_amplitude(self.histograms.flatten(0, 1), amplitude.view(-1, 1), self.spec.fmt)
            amplitude = flat.view_as(amplitude)
        amplitude = amplitude[nearest_seen(self.seen)]
        amplitude = torch.where(amplitude > 0, amplitude, amplitude.amax(-1, keepdim=True))
        return STORES["fp32"].encode(amplitude, self.spec.fmt, None).to(self.device)


def scale_times(scale: Tensor, spec: ActivationSpec, absmax: Tensor, factor: Tensor) -> Tensor:
    """Static scales of an input whose channels are multiplied by `factor`, clipped as much as before; same shape.

    `scale` is float32 in the spec's `scale_shape`; `absmax` and `factor` (channels,), the largest magnitudes before.
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
    """For each range the number of the nearest one that has samples: int64 (ranges,), on the CPU.

    `seen` is bool (ranges,), at least one True; of two at the same distance the lower is taken.
    """
    numbers = seen.cpu().nonzero().flatten()
    return numbers[(torch.arange(len(seen)).unsqueeze(-1) - numbers).abs().argmin(-1)]


def histogram(magnitudes: Tensor) -> Tensor:
    """How many of the magnitudes round to each bfloat16 value of the bins; int64, one dimension."""
    codes = magnitudes.bfloat16().view(torch.int16).flatten().int()
    return torch.bincount((codes - _FIRST_BIN).clamp(0, _BINS - 1), minlength=_BINS)


def least_error_amplitude(histograms: Tensor, absmax: Tensor, fmt: Format) -> Tensor:
    """The multiple of `absmax` (ranges, 1) that clips and rounds with the least squared error; same shape.

    The magnitudes are those of `histograms` (ranges, bins).
    """
    values = torch.arange(_FIRST_BIN, _FIRST_BIN + _BINS, dtype=torch.int16).view(torch.bfloat16).float()
    amplitudes = absmax * torch.tensor(CLIPS)  # ranges, clips
    scales = STORES["fp32"].encode(amplitudes, fmt, None)
    errors = [
        ((fmt.round(values / scale.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).sub_(values)).square_() @ counts.float())
        for scale, counts in zip(scales, histograms, strict=True)
    ]
    return amplitudes.gather(1, torch.stack(errors).argmin(-1, keepdim=True))


def check_timesteps(store: "CalibrationStore") -> None:
    """Ranges of 0..SCHEDULE mean nothing to a model that counts time otherwise, such as from 0 to 1."""
    latest = max(store.timesteps)
    if not 1 < latest <= SCHEDULE:
        raise UserError(
            f"this model's timesteps go up to {latest:g} and not {SCHEDULE:g}, so they cannot be cut into ranges: "
            "use activation scales online or static:1, and bias and smooth with ranges: 1"
        )
