"""The formats of all layers by what they cost, for a target: the recipe of that, and the uniform one beside it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from dmquant.calib.choice.allocation import Choice, cheapest, smallest, uniform
from dmquant.calib.choice.options import options_of
from dmquant.convert import of_backbone
from dmquant.errors import UserError
from dmquant.host.console import Console
from dmquant.host.units import size_text
from dmquant.pipelines.choice.quality import Quality
from dmquant.pipelines.choice.record import Study, decibels
from dmquant.pipelines.choice.targets import Target
from dmquant.recipe import Recipe
from dmquant.settings import Rule

TRIES = 7  # of sizes, each halving the range in which a quality is reached
EQUAL = 1.01  # a uniform model of up to so many times the bytes counts as one of equal size
HEADER = 256  # bytes a tensor in the header of a safetensors file, at most


@dataclass(frozen=True)
class Chosen:
    """A recipe for a target, with its predicted cost; `uniform` has one format for all layers: the recipe's own
    where sizes are as good as equal, or else the best that is no larger, None where there is none."""

    recipe: Recipe
    choice: Choice
    bits: float
    uniform: Recipe | None
    lines: tuple[str, ...]


class Chooser:
    """Chooses by a study of costs under a recipe; `quality` measures a choice's images, for targets that ask it."""

    def __init__(
        self, recipe: Recipe, study: Study, console: Console, other_bytes: int, quality: "Quality | None" = None
    ):
        self.recipe, self.study, self.console, self.quality = recipe, study, console, quality
        self.other_bytes = other_bytes
        self.options = {option.name: option for option in options_of(of_backbone(recipe))}

    @cached_property
    def layers(self) -> dict[str, dict[str, float]]:
        """Costs by layer and option."""
        return {name: layer.costs(self.study.base) for name, layer in self.study.quantized.items()}

    @cached_property
    def sizes(self) -> dict[str, dict[str, int]]:
        """Bytes by layer and option."""
        return {name: layer.bytes for name, layer in self.study.quantized.items()}

    @property
    def weights(self) -> int:
        """The number of weights to quantize."""
        return sum(layer.weights for layer in self.study.quantized.values())

    def choose(self, target: Target) -> Chosen:
        """The choice for a target; UserError, with the nearest that can be reached, where none does."""
        if target.psnr is not None or target.lpips is not None:
            choice = self._of_quality(target)
        else:
            choice = cheapest(self.layers, self.sizes, self._bytes(target))
        bits = self.bits(choice.bytes)
        name = f"{self.recipe.name}-{target.words}"
        recipe = self._recipe(choice, name, bits)
        same, uniform_recipe = self._uniform(choice), None
        lines = [f"{bits:.2f} bits a weight: {self._counted(choice)}"]
        if same is not None:
            option, beside = same
            uniform_recipe = self.recipe.with_settings(
                **self.options[option].settings,
                name=f"uniform-{option.replace(' ', '-').replace(':', '')}",
                description=f"{option} for all layers, {self.bits(beside.bytes):.2f} bits a weight",
            )
            gain = decibels(choice.cost, self.study.power) - decibels(beside.cost, self.study.power)
            lines.append(
                f"by the measured costs {gain:.1f} dB nearer at the final latents than {option} for all "
                f"({self.bits(beside.bytes):.2f} bits)"
            )
        return Chosen(recipe, choice, bits, uniform_recipe, tuple(lines))

    def bits(self, count: int) -> float:
        """Bits a weight of so many bytes."""
        return 8 * count / self.weights

    def _bytes(self, target: Target) -> int:
        least = smallest(self.sizes)
        if target.bits is not None:
            most = int(target.bits * self.weights / 8)
            if most < least:
                raise UserError(
                    f"--target-bits {target.bits:g} cannot be reached: the smallest choice takes "
                    f"{self.bits(least):.3f} bits a weight, scales included; ask for that or more"
                )
            return most
        most = target.size - self.other_bytes
        if most < least:
            raise UserError(
                f"--target-size {size_text(target.size)} cannot be reached: the smallest choice makes a backbone of "
                f"{size_text(least + self.other_bytes, round_up=True)}, of which {size_text(self.other_bytes)} stay in "
                "high precision; ask for that or more"
            )
        return most

    def _of_quality(self, target: Target) -> Choice:
        """The smallest choice whose images are as near as asked, found by halving the range of sizes."""
        low, high = smallest(self.sizes), max(map(self._all_bytes, self._common()))
        best = cheapest(self.layers, self.sizes, high)
        asked = f"--min-psnr {target.psnr:g}" if target.psnr is not None else f"--max-lpips {target.lpips:g}"
        unit = " dB" if target.psnr is not None else ""
        reached = self.quality.of(best.options, target)
        if not self.quality.is_enough(reached, target):
            without = self.quality.of({}, target)
            raise UserError(
                f"{asked} cannot be reached: the largest choice ({self.bits(best.bytes):.2f} bits a weight) reaches "
                f"{reached:.4g}{unit} on the calibration prompts, and weights in full precision {without:.4g}{unit}: "
                "ask for less, or give the inputs more bits with --a"
            )
        with self.console.bar("sizes") as bar:
            for tried in range(TRIES):
                bar(tried, TRIES)
                choice = cheapest(self.layers, self.sizes, (low + high) // 2)
                found = self.quality.of(choice.options, target)
                self.console.note(f"{self.bits(choice.bytes):.3f} bits a weight: {found:.4g}{unit}")
                if self.quality.is_enough(found, target):
                    best, high, reached = choice, choice.bytes, found
                else:
                    low = (low + high) // 2
        self.console.say(f"{asked}: {reached:.4g}{unit} on the calibration prompts at {self.bits(best.bytes):.2f} bits")
        return best

    def _common(self) -> list[str]:
        return list(uniform(self.sizes, self.layers))

    def _all_bytes(self, option: str) -> int:
        return sum(of_layer[option] for of_layer in self.sizes.values())

    def _uniform(self, choice: Choice) -> tuple[str, Choice] | None:
        """The recipe's own option if its size equals the choice's, or else the best one that is no larger."""
        found = {
            option: one for option, one in uniform(self.sizes, self.layers).items() if one.bytes <= EQUAL * choice.bytes
        }
        if not found:
            return None
        own = found.get(self.study.base)
        if own is not None and EQUAL * own.bytes >= choice.bytes:
            return self.study.base, own
        measured = self.study.formats
        best = min(found, key=lambda option: measured.get(option, found[option].cost))
        return best, found[best]

    def _recipe(self, choice: Choice, name: str, bits: float) -> Recipe:
        """The recipe with a rule for the layers of each option, smallest first; rules of its own come before."""
        of_option: dict[str, list[str]] = {}
        for layer, option in choice.options.items():
            of_option.setdefault(option, []).append(layer)
        ordered = sorted(of_option, key=lambda option: self._all_bytes_of(option))
        rules = [
            Rule(match=of_option[option], reason=self._reason(of_option[option], option), **self._settings(option))
            for option in ordered
        ]
        described = f"chosen for {self.study.model}: {bits:.2f} bits a weight; {self._counted(choice)}"
        return self.recipe.with_settings(name=name, description=described, rules=[*self.recipe.rules, *rules])

    def _all_bytes_of(self, option: str) -> float:
        of_layers = [
            (layer.bytes[option], layer.weights) for layer in self.study.quantized.values() if option in layer.bytes
        ]
        return sum(count for count, _ in of_layers) / sum(weights for _, weights in of_layers)

    def _settings(self, option: str) -> Mapping[str, object]:
        own = {"weights": self.recipe.weights, "granularity": self.recipe.granularity, "store": self.recipe.store}
        return own | dict(self.options[option].settings)

    def _reason(self, layers: list[str], option: str) -> str:
        weights = sum(self.study.layers[name].weights for name in layers) / self.weights
        base = sum(layer.cost for layer in self.study.quantized.values()) or 1.0
        cost = sum(self.study.layers[name].cost for name in layers) / base
        return f"{weights:.0%} of the weights, which make {cost:.1%} of the error in {self.study.base}"

    def _counted(self, choice: Choice) -> str:
        counts = Counter(choice.options.values())
        return ", ".join(f"{counts[option]} layers in {option}" for option in self.options if counts[option])


def other_bytes(backbone: torch.nn.Module, study: Study) -> int:
    """Bytes of all that a backbone's file holds beside the weights that are quantized, in 16 bit, and its header."""
    tensors = backbone.state_dict()
    weights = sum(layer.weights for layer in study.quantized.values())
    elements = sum(tensor.numel() for tensor in tensors.values())
    return 2 * (elements - weights) + HEADER * (len(tensors) + 3 * len(study.quantized))
