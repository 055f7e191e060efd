"""An engine: how its kernels round inputs, the formats that it runs, and the layers that it cannot take."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from dmquant.activations import ActivationSpec
from dmquant.convert import plan
from dmquant.errors import UsageError
from dmquant.recipe import Recipe
from dmquant.scaling import BLOCK_FORMATS
from dmquant.settings import NO_FORMAT, format_name

FORMATS = "dmquant.exchange.formats"  # imported where layers are asked for: loading a model takes none of it
Round = Callable[[Tensor, Tensor | None], Tensor]
"""Tokens (n, channels), any float dtype, and the static scale, 0-dim float32 or None; to float32 values, same shape."""


@dataclass(frozen=True)
class Rounding:
    """What an engine's kernel makes of an input."""

    name: str
    round: Round = field(compare=False)

    def fake_quantize(self, x: Tensor, spec: ActivationSpec, dim: int, scale: Tensor | None) -> Tensor:
        """As `activations.fake_quantize`, same shapes and dtypes; a static scale is one number."""
        channels_last = x.movedim(dim, -1)
        tokens = channels_last.reshape(-1, channels_last.shape[-1])
        values = self.round(tokens, None if scale is None else scale.reshape(()))
        return values.view(channels_last.shape).movedim(-1, dim).to(x.dtype)


@dataclass(frozen=True)
class Engine:
    """An engine by the name of the format that it reads."""

    name: str
    inputs: Sequence[tuple[ActivationSpec, Round]] = field(compare=False)
    """The inputs that its kernels take, as recipes name them, and their rounding."""
    formats: Mapping[tuple[str, str], Mapping[str, Any]] = field(compare=False)
    """Names of the formats of weights and inputs that it runs, to settings of a recipe; the preferred ones first."""

    def taking(self, spec: ActivationSpec) -> ActivationSpec:
        """The spec, rounded as this engine does; UsageError for inputs that none of its kernels takes."""
        for known, function in self.inputs:
            if spec == known:
                return replace(spec, engine=Rounding(self.name, function))
        listed = ", ".join(f"{known} in {known.store}" for known, _ in self.inputs)
        raise UsageError(f"{self.name} takes no inputs in {spec} in {spec.store}: it takes {listed}")

    def settings(self, weights: str | None, inputs: str | None) -> Mapping[str, Any]:
        """The settings with which it runs these formats, of which one may be None; UsageError, which lists them."""
        wanted = tuple(None if name is None else format_name(name) for name in (weights, inputs))
        for names, settings in self.formats.items():
            if all(one in (None, name) for one, name in zip(wanted, names, strict=True)):
                return settings
        listed = ", ".join(" with ".join(names) for names in self.formats)
        asked = " with ".join(name or "any" for name in wanted)
        raise UsageError(f"{self.name} runs no weights and inputs in {asked}: it runs {listed}")

    def refused(self, recipe: Recipe, model: nn.Module) -> dict[str, list[str]]:
        """The layers of a model that the engine cannot take as the recipe has them, by the reason."""
        read_by_it = importlib.import_module(FORMATS).formats().get(self.name)
        if read_by_it is None or read_by_it.refuses is None:
            return {}
        found: dict[str, list[str]] = {}
        for step in plan(model, recipe):
            reason = read_by_it.refuses(model.get_submodule(step.name), step.weights, step.activations)
            if reason is None and read_by_it.refuses_in is not None:
                reason = read_by_it.refuses_in(model, step.name, step.weights)
            if reason:
                found.setdefault(reason, []).append(step.name)
        return found


def weights_in(format: str, inputs: str = NO_FORMAT, of: str = "token", static: bool = False, **more: Any) -> dict:
    """Settings of a recipe: a block format, or one scale an output, of weights; the inputs' format, granularity, scale.

    Scales of blocks are fitted to what an error costs GPTQ, the wide ones of whole rows to the output's error.
    """
    block, of_inputs = BLOCK_FORMATS.get(format), BLOCK_FORMATS.get(inputs)
    _, granularity, store = block or ("", "channel", "fp32")
    return {
        "weights": format,
        "granularity": granularity,
        "store": store,
        "scale": "lean" if block else "hessian",
        "activations": inputs,
        "activation_granularity": of_inputs.granularity if of_inputs else of,
        "activation_scale": "static:1" if static else "online",
        **more,
    }


def formats(*pairs: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Settings by the names of their formats."""
    return {(format_name(one["weights"]), format_name(one["activations"])): one for one in pairs}
