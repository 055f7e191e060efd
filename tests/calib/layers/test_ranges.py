"""Static activation scales are what the calibration samples say, range by range."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from dmquant.activations import ActivationSpec, fake_quantize
from dmquant.calib.data.capture import capture
from dmquant.calib.data.sampling import Sample, Sampling
from dmquant.calib.layers.ranges import CLIPS, histogram, least_error_amplitude, observe_ranges
from dmquant.diffusers.arguments import Calls
from dmquant.diffusers.timesteps import share_timesteps
from dmquant.errors import UserError
from dmquant.formats import get_format
from dmquant.layers import quantize_layer
from dmquant.qtensor import WeightSpec
from tests.tiny import IMAGE_SIZE, PIXART_CALL, tiny_pixart, tiny_sd


class Backbone(nn.Module):
    """A convolution, then a linear layer over its pixels, in a batch of rows."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.idle = nn.Conv2d(6, 8, 1), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.linear(self.conv(sample).flatten(2).mT)


@dataclass
class Store:
    """What `observe_ranges` uses of a CalibrationStore: a sample's input is noise times one plus its step."""

    steps: list[int]
    held_out: tuple[int, ...] = ()
    timesteps: tuple[float, ...] = (950.0, 700.0, 650.0, 50.0)
    rows: int = 2
    samples: list[Sample] = field(init=False)
    inputs: list[torch.Tensor] = field(init=False)

    def __post_init__(self):
        self.samples = [Sample(0, step, index in self.held_out) for index, step in enumerate(self.steps)]
        generator = torch.Generator().manual_seed(0)
        self.inputs = [torch.randn(self.rows, 6, 3, 3, generator=generator) * (1 + step) for step in self.steps]

    def batch(self, indices, device="cpu"):
        timesteps = [self.timesteps[self.samples[index].step] for index in indices]
        sample = torch.cat([self.inputs[index] for index in indices])
        return (sample.to(device),), {"timestep": torch.tensor(timesteps).repeat_interleave(self.rows)}


def static(ranges, granularity="tensor", format="fp6"):
    return ActivationSpec.parse(format, granularity, scale=f"static:{ranges}")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scales_are_the_absmax_of_each_range(batch_size):
    backbone, store = Backbone(), Store([0, 1, 2, 3, 3, 0])
    layers = {"conv": static(4, "channel"), "linear": static(4), "idle": ActivationSpec.parse("fp6")}
    scales = observe_ranges(backbone, layers, store, batch_size, clip=False)
    assert set(scales) == {"conv", "linear"}
    for index, samples in {3: [0, 5], 2: [1, 2], 0: [3, 4]}.items():
        x = torch.cat([store.inputs[sample] for sample in samples])
        assert torch.equal(scales["conv"][index], x.abs().amax((0, 2, 3)) / 7.5)
        assert torch.allclose(scales["linear"][index], backbone.conv(x).abs().amax() / 7.5)
    assert scales["conv"].shape == (4, 6)
    assert scales["linear"].shape == (4, 1)


def test_a_static_base_puts_the_largest_magnitude_at_the_end_of_both_formats():
    store = Store([0, 1, 2, 3])
    spec = ActivationSpec.parse("nvfp4", scale="static:1")
    base = observe_ranges(Backbone(), {"conv": spec}, store, 2)["conv"]
    largest = torch.cat(store.inputs).abs().max()
    assert base.shape == spec.scale_shape(6) == (1, 1)
    assert base.item() == pytest.approx(largest.item() / (6 * 448), rel=1e-6)


def test_a_range_without_samples_takes_the_nearest_one():
    scales = observe_ranges(Backbone(), {"conv": static(10)}, Store([0, 3]), 2, clip=False)["conv"].flatten()
    assert scales.tolist() == [scales[0]] * 5 + [scales[9]] * 5
    assert scales[0] != scales[9]


def test_a_channel_that_was_always_zero_takes_the_largest_scale():
    store = Store([0, 3])
    for x in store.inputs:
        x[:, 2] = 0
    scales = observe_ranges(Backbone(), {"conv": static(2, "channel")}, store, 2)["conv"]
    assert torch.equal(scales[:, 2], scales.amax(1))


def test_one_range_is_all_samples_whatever_the_timesteps():
    store = Store([0, 1, 2, 3], timesteps=(1.0, 0.7, 0.3, 0.1))
    scales = observe_ranges(Backbone(), {"conv": static(1)}, store, 4, clip=False)["conv"]
    assert scales.item() == torch.cat(store.inputs).abs().amax() / 7.5


def test_held_out_samples_are_not_looked_at():
    told = []
    some = Store([0, 1, 2, 3], held_out=(3,))
    scales = observe_ranges(Backbone(), {"conv": static(1)}, some, 2, lambda *counts: told.append(counts))
    assert torch.equal(scales["conv"], observe_ranges(Backbone(), {"conv": static(1)}, Store([0, 1, 2]), 2)["conv"])
    assert told == [(2, 3), (3, 3)]


@pytest.mark.parametrize("format", ["fp6", "fp6_e3m2", "int8", "fp4"])
@pytest.mark.parametrize("tail", [1.0, 2.5])
def test_clipping_is_within_two_percent_of_the_least_squared_error(format, tail):
    generator = torch.Generator().manual_seed(0)
    x, fmt = torch.randn(20_000, generator=generator).abs() ** tail, get_format(format)
    top = x.amax().view(1, 1)

    def error(amplitude):
        scale = amplitude / fmt.max
        return (fmt.round(x / scale) * scale - x).square().sum().item()

    chosen = least_error_amplitude(histogram(x).unsqueeze(0), top, fmt).item()
    assert error(chosen) <= 1.02 * min(error(top.item() * clip) for clip in CLIPS)
    assert error(chosen) <= 1.002 * error(top.item())  # bins of bfloat16 do not tell less apart


@pytest.mark.parametrize("clip", [True, False])
def test_the_scales_of_a_split_input_are_those_of_its_halves_alone(clip):
    """A quiet half behind a loud one: of a Linear layer and of a convolution."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            layers = {f"conv{channels}": nn.Conv2d(channels, 4, 1) for channels in (4, 2, 6)}
            layers |= {f"linear{channels}": nn.Linear(channels, 4) for channels in (4, 2, 6)}
            self.layers = nn.ModuleDict(layers)

        def forward(self, sample, timestep):
            for channels, part in ((6, sample), (4, sample[:, :4]), (2, sample[:, 4:])):
                self.layers[f"conv{channels}"](part)
                self.layers[f"linear{channels}"](part.flatten(2).mT)

    store = Store([0, 1, 2, 3])
    for x in store.inputs:
        x[:, 4:] *= 0.01
    for kind in ("conv", "linear"):
        specs = {f"layers.{kind}{channels}": static(3, format="fp4") for channels in (4, 2)}
        specs[f"layers.{kind}6"] = ActivationSpec.parse("fp4", "tensor", scale="static:3", split=4)
        first, rest, both = observe_ranges(Halves(), specs, store, 2, clip=clip).values()
        assert torch.equal(both, torch.cat([first, rest], 1))
        assert (both[:, 1] < 0.05 * both[:, 0]).all()


def test_clipping_lowers_the_error_of_inputs_with_outliers():
    store = Store([0, 1, 2, 3])
    store.inputs[0][0, 0, 0, 0] = 30.0
    spec, x = static(1, format="fp4"), torch.cat(store.inputs)

    def error(clip):
        scale = observe_ranges(Backbone(), {"conv": spec}, store, 4, clip=clip)["conv"].view(1, 1, 1, 1)
        return (fake_quantize(x, spec, -3, scale) - x).square().sum()

    assert error(clip=True) < error(clip=False)


def test_quantized_layers_look_up_what_was_observed():
    backbone, store = Backbone(), Store([0, 3])
    args, kwargs = store.batch([0, 1])
    layers = {"conv": static(2, "channel", "fp8"), "linear": static(2, "tensor", "fp8")}
    scales = observe_ranges(backbone, layers, store, 2)
    exact = backbone(*args, **kwargs)
    for name, spec in layers.items():
        layer, weights = backbone.get_submodule(name), WeightSpec.parse("int8", "channel")
        backbone.set_submodule(name, quantize_layer(layer, weights, spec, input_scale=scales[name]))
    ranges = share_timesteps(backbone)
    ranges.set(kwargs["timestep"])
    right = (backbone(*args, **kwargs) - exact).square().mean()
    ranges.set(kwargs["timestep"].flip(0))
    wrong = (backbone(*args, **kwargs) - exact).square().mean()
    assert right < 0.003 * exact.square().mean()
    assert wrong > 10 * right  # late inputs are four times as large, and clipped by the early ones' scales


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_named(value):
    store = Store([0, 1])
    store.inputs[1][0, 0, 0, 0] = value
    backbone = Backbone()
    with pytest.raises(UserError, match="layer conv holds NaN or infinity"):
        observe_ranges(backbone, {"conv": static(1)}, store, 2)
    assert not backbone.conv._forward_pre_hooks


def test_what_cannot_be_observed_is_said_in_one_line():
    with pytest.raises(UserError, match="no samples to learn from"):
        observe_ranges(Backbone(), {"conv": static(1)}, Store([0], held_out=(0,)), 1)
    with pytest.raises(UserError, match="no calibration sample reached layer idle"):
        observe_ranges(Backbone(), {"idle": static(1)}, Store([0]), 1)
    for timesteps in ((1.0, 0.5, 0.2, 0.1), (4000.0, 3000.0, 2000.0, 1000.0)):
        with pytest.raises(UserError, match="cannot be cut into ranges"):
            observe_ranges(Backbone(), {"conv": static(4)}, Store([0], timesteps=timesteps), 1)


@pytest.mark.parametrize(
    ("build", "component", "layer", "options"),
    [
        (tiny_pixart, "transformer", "transformer_blocks.0.ff.net.2", PIXART_CALL),
        (tiny_sd, "unet", "mid_block.resnets.0.conv1", {}),
    ],
)
def test_captured_calls_reach_the_ranges_of_their_timesteps(build, component, layer, options, tmp_path):
    pipeline, magnitudes = build(), {}
    call = {"num_inference_steps": 4, "height": IMAGE_SIZE, "width": IMAGE_SIZE, "guidance_scale": 3.0, **options}
    store = capture(
        pipeline,
        component,
        Calls(["a red cat", "a blue boat", "a tree"], 0, call),
        sampling=Sampling("uniform", steps_per_prompt=4, held_out=0.3, seed=0),
        batch_size=2,
        folder=tmp_path,
        made_for={},
    )
    backbone = getattr(pipeline, component)
    scales = observe_ranges(backbone, {layer: static(1000)}, store, 3, clip=False)[layer].flatten()

    def see(module, args):
        magnitudes[round(store.timesteps[step])] = max(
            magnitudes.get(round(store.timesteps[step]), 0), args[0].abs().max()
        )

    backbone.get_submodule(layer).register_forward_pre_hook(see)
    for index, sample in enumerate(store.samples):
        if not sample.held_out:
            step = sample.step
            args, kwargs = store.batch([index])
            with torch.inference_mode():
                backbone(*args, **kwargs)
    assert len(magnitudes) == 4
    for timestep, magnitude in magnitudes.items():
        assert scales[min(timestep, 999)].item() == pytest.approx(magnitude.item() / 7.5, rel=1e-5)
