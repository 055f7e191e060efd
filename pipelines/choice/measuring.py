"""The final latents of a pipeline while layers of its backbone are changed, against those of full precision."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.calib.blocks.replay import replaced_forward
from dmquant.calib.choice.contributions import Change, Contributions, watching
from dmquant.diffusers.arguments import Calls
from dmquant.errors import UserError
from dmquant.layers import QUANTIZED
from dmquant.qtensor import WeightSpec

Active = Callable[[int], bool]
"""Whether a change holds in a call of the backbone, by its number from 0."""


def always(call: int) -> bool:
    """In every call."""
    return True


class Bench:
    """Runs a full-precision pipeline on the same prompts again and again, and measures what a change does.

    A cost is the mean squared difference of the final latents, over prompts and elements. `pipeline` is called with
    prompts; its part `component` is the backbone.
    """

    def __init__(self, pipeline: Any, component: str, calls: Calls, batch_size: int):
        self.pipeline, self.calls = pipeline, calls
        self.backbone: nn.Module = getattr(pipeline, component)
        count = len(calls)
        self.batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        self._number = 0

    @cached_property
    def clean(self) -> Tensor:
        """Final latents in full precision, (prompts, ...) float32 on the CPU; UserError unless they are finite."""
        found = self._latents()
        if not torch.isfinite(found).all():
            raise UserError("the full-precision pipeline ends in NaN or infinity; try another --dtype")
        return found

    @property
    def steps(self) -> int:
        """Calls of the backbone in one call of the pipeline."""
        if not self._number:
            self.run()
        return self._number

    def cost(self) -> float:
        """The cost of what is changed now."""
        return (self._latents() - self.clean).square().mean().item()

    def images(self) -> Tensor:
        """The images under what is changed now, uint8 (prompts, 3, height, width), as they would be saved."""
        found = []
        with self._counting():
            for batch in self.batches:
                self._number = 0
                for image in self.calls.made(self.pipeline, batch, "pil"):
                    found.append(torch.from_numpy(numpy.array(image.convert("RGB"))).movedim(-1, 0))
        return torch.stack(found)

    def run(self) -> None:
        """Call the pipeline, for what hooks see of it."""
        self._latents()

    @contextlib.contextmanager
    def weights(self, weights: Mapping[str, Tensor], active: Active = always) -> Iterator[None]:
        """Let layers, by name, have other weights (out, in, ...) in the calls that are active, until the block ends."""
        layers = {name: self.backbone.get_submodule(name) for name in weights}
        exact = {name: layer.weight.data for name, layer in layers.items()}
        others = {name: weights[name].to(exact[name]) for name in layers}

        def put(chosen: Mapping[str, Tensor]) -> None:
            for name, layer in layers.items():
                layer.weight.data = chosen[name]

        hook = self.backbone.register_forward_pre_hook(
            lambda module, args: put(others if active(self._number) else exact)
        )
        try:
            yield
        finally:
            hook.remove()
            put(exact)

    @contextlib.contextmanager
    def inputs(self, specs: Mapping[str, ActivationSpec], active: Active = always) -> Iterator[None]:
        """Let layers, by name, quantize their inputs in the calls that are active, until the block ends."""
        with contextlib.ExitStack() as stack:
            for name, spec in specs.items():
                layer = self.backbone.get_submodule(name)
                stack.enter_context(replaced_forward(layer, self._quantizing(layer, spec, active)))
            yield

    def contributions(self, changes: Mapping[str, Mapping[str, Change]]) -> list[Contributions]:
        """Contributions to the final latents of changes of layers, by layer and kind, one a batch of prompts."""
        generator, found = torch.Generator().manual_seed(self.calls.seed), []
        for batch in self.batches:
            with watching(self.backbone, changes, self.steps, len(batch)) as of_batch, torch.enable_grad():
                latents = self.calls.latents(self.pipeline, batch, differentiable=True)
                noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
                (latents.float() * noise.to(latents.device)).sum().backward()
            found.append(of_batch)
        return found

    def _quantizing(self, layer: nn.Module, spec: ActivationSpec, active: Active) -> Callable[[Tensor], Tensor]:
        forward, quantize = layer.forward, quantizer(layer, spec)
        return lambda x: forward(quantize(x) if active(self._number) else x)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        def count(module: nn.Module, args: tuple, output: Any) -> None:
            self._number += 1

        hook = self.backbone.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def _latents(self) -> Tensor:
        found = []
        with self._counting():
            for batch in self.batches:
                self._number = 0
                found.append(self.calls.latents(self.pipeline, batch).float().cpu())
        return torch.cat(found)


def quantizer(layer: nn.Module, spec: ActivationSpec) -> Callable[[Tensor], Tensor]:
    """A function that quantizes a layer's input, (rows, ..., in) or (rows, in, height, width), same shape and dtype.

    Static scales are taken from the call, as there is no calibration before costs are known.
    """
    if spec.ranges:
        spec = replace(spec, ranges=None, engine=None)
    plain = WeightSpec.parse("fp8", "channel")
    quantized = QUANTIZED[type(layer)].like(layer, plain, spec, "meta")
    return quantized.quantize_input
