"""What a model's layers cost in every format: costs.json, as a sensitivity study writes it and a choice reads it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dmquant.errors import UserError
from dmquant.host.files import sealed_json, take_seal, write_text

VERSION = 1


class LayerCosts(BaseModel, extra="forbid"):
    """A layer. Costs are mean squared changes of the final latents; those in other options follow from the errors."""

    kind: str
    weights: int
    kept: str | None = None
    """Why the recipe leaves it in high precision; None where it is quantized."""
    bytes: dict[str, int]
    """By option."""
    errors: dict[str, float]
    """Mean squared error of the output by option, as it was solved."""
    measured: float | None = None
    """The cost of the weight in the base option, with all else in full precision."""
    estimated: float | None = None
    """The same to second order, from one pass back."""
    inputs: dict[str, float] = {}
    """By option, to second order, the cost of quantizing the layer's input as goes with that option."""
    by_step: list[float] = []
    """`estimated` if the weight were changed in that call of the backbone alone."""

    @property
    def cost(self) -> float:
        """The cost in the base option: measured where it was."""
        return (self.measured if self.measured is not None else self.estimated) or 0.0

    def weight_costs(self, base: str) -> dict[str, float]:
        """The cost of the weight by option: that of the base option times the ratio of the errors."""
        least = max(self.errors[base], 1e-30)
        return {option: self.cost * error / least for option, error in self.errors.items()}

    def costs(self, base: str) -> dict[str, float]:
        """The cost by option, of the weight and of the input."""
        return {option: cost + self.inputs.get(option, 0.0) for option, cost in self.weight_costs(base).items()}


class RangeCosts(BaseModel, extra="forbid"):
    """Calls of the backbone from `first` to `last`, and the cost of quantizing all layers in these alone."""

    first: int
    last: int
    weights: float
    inputs: float | None = None


class Study(BaseModel, extra="forbid"):
    """All costs of one model under one recipe."""

    version: int = VERSION
    model: str
    recipe: str
    key: str
    """Fingerprint of all that the costs depend on."""
    base: str
    prompts: int
    steps: int
    power: float
    """Mean square of the final latents of full precision."""
    layers: dict[str, LayerCosts]
    formats: dict[str, float] = {}
    """By option, the cost of all quantized layers in it at once, measured."""
    inputs: dict[str, float] = {}
    """By format of the inputs of all quantized layers, with weights in full precision, measured."""
    ranges: list[RangeCosts] = []
    correlation: float | None = None
    """Spearman's rank correlation of estimated and measured costs of the layers."""
    seconds: dict[str, float] = {}

    @property
    def quantized(self) -> dict[str, LayerCosts]:
        """The layers that the recipe quantizes."""
        return {name: layer for name, layer in self.layers.items() if layer.kept is None}

    def bits(self, option: str) -> float:
        """Bits a quantized weight if all quantized layers are in one option."""
        layers = self.quantized.values()
        return 8 * sum(layer.bytes[option] for layer in layers) / sum(layer.weights for layer in layers)

    def predicted(self, option: str) -> float:
        """The sum of the costs of the quantized layers in one option, which `formats` has measured."""
        return sum(layer.weight_costs(self.base)[option] for layer in self.quantized.values())

    def save(self, path: Path) -> None:
        """Write as JSON, which carries its hash."""
        write_text(path, json.dumps(sealed_json(self.model_dump()), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Study":
        """The study in a file; UserError for what is none, of another version, or not as it was written."""
        advice = "run `dmquant sensitivity` again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read the costs in {path} ({' '.join(str(error).split())}): {advice}") from error
        if not isinstance(content, dict) or take_seal(content) is False or content.get("version") != VERSION:
            raise UserError(f"{path} holds no costs of this version as they were written: {advice}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise UserError(f"{path} holds no costs: {advice}") from error


def decibels(cost: float, power: float) -> float:
    """A cost as a signal-to-noise ratio of the final latents in dB; larger is better."""
    return math.inf if cost <= 0 else 10 * math.log10(power / cost)


def shares(layers: Mapping[str, LayerCosts]) -> dict[str, float]:
    """The share that each layer has in the sum of all costs."""
    whole = sum(layer.cost for layer in layers.values()) or 1.0
    return {name: layer.cost / whole for name, layer in layers.items()}


def as_rows(study: Study) -> list[dict[str, Any]]:
    """The layers as rows of a table, those of most cost first."""
    of_all = shares(study.layers)
    ordered = sorted(study.layers.items(), key=lambda item: -item[1].cost)
    return [
        {
            "layer": name,
            "kind": layer.kind,
            "weights": layer.weights,
            "kept": layer.kept or "",
            "measured": layer.measured,
            "estimated": layer.estimated,
            "inputs": layer.inputs.get(study.base),
            "share": of_all[name],
        }
        for name, layer in ordered
    ]
