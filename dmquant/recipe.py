"""Recipes: which layers of a model become which format, and how. YAML or JSON, checked when read."""

import importlib.resources
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from dmquant.errors import UsageError, UserError, unknown
from dmquant.matching import Matcher
from dmquant.registry import engine_of
from dmquant.settings import NO_FORMAT, ONLINE, Objective, Rounding, Rule, Settings, Transformation, format_name
from dmquant.yaml_models import read_yaml, validated

_FOLDER = importlib.resources.files("dmquant.configs") / "recipes"
_FLOATS = {4: "fp4", 6: "fp6", 8: "fp8", 16: "none"}
_BITS = {
    f"w{w}a{a}": {"weights": of_w, "activations": of_a} for w, of_w in _FLOATS.items() for a, of_a in _FLOATS.items()
}
MOST = 10_000_000  # of anything that is counted: no use needs more, and no more than a typing error asks for it


class Calibration(BaseModel, extra="forbid", frozen=True):
    """The choice of calls of the full-precision backbone to calibrate on."""

    prompts: int = Field(default=128, ge=2, le=MOST)
    steps_per_prompt: int = Field(default=10, ge=1, le=MOST)
    sampler: Literal["uniform", "stratified", "importance"] = "stratified"
    held_out: float = Field(default=0.125, gt=0, lt=1)
    """Share of the prompts that nothing is learned from; roundings are judged on them."""
    seed: int = Field(default=0, ge=0, lt=2**63)


class Learning(BaseModel, extra="forbid", frozen=True):
    """Settings of learning the roundings of a unit, for every rounding method."""

    objective: Objective = Objective()

    unit: Literal["layer", "block", "window", "model"] = "block"
    """`model`: blocks are solved, or rounded to nearest, and then all layers are learned together."""
    window: int = Field(default=2, ge=1, le=MOST)
    """Blocks a window. Only for unit: window."""
    overlap: int | None = Field(default=None, ge=0, lt=MOST)
    """Blocks that a window shares with the one before it, by default all but one."""
    iterations: int = Field(default=1000, ge=0, le=MOST)
    batch_size: int = Field(default=16, ge=1, le=MOST)
    """Backbone calls a step; each holds both guidance branches."""
    learning_rate: float | None = Field(default=None, gt=0)
    """By default the rounding method's own."""
    full_precision_inputs: float = Field(default=0.0, ge=0, le=1)
    """Share of a unit's input elements that come from full precision instead of the quantized units before it."""
    quantize_activations: bool = True
    """Whether activations are quantized while roundings are learned."""
    activation_drop: float = Field(default=0.0, ge=0, le=1)
    """Share of the elements that a step leaves out of quantizing activations."""
    distribution_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps by which full-precision inputs are moved to the mean statistics of all samples; PD-Quant takes 500."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    checks: int = Field(default=5, ge=1, le=MOST)
    """The number of times the hard-rounded unit is tried on held-out data; the best of these is kept."""
    checkpoint_every: int = Field(default=100, ge=1, le=MOST)
    """Steps after which the state is kept on disk. Only for unit: model."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def stride(self) -> int:
        """Blocks from the beginning of one window to that of the next."""
        return 1 if self.overlap is None else self.window - self.overlap

    @model_validator(mode="after")
    def _moves_on(self) -> "Learning":
        if self.stride < 1:
            raise UsageError(f"overlap: windows of {self.window} blocks share at most {self.window - 1} with the next")
        return self


@dataclass(frozen=True)
class Known:
    """The meaning of `keep: family` in a recipe for one model."""

    keep: Mapping[str, str]
    """Globs of layers that stay in high precision, and why."""
    splits: Mapping[str, int] = field(default_factory=dict)
    """Layers whose input is a concatenation, with the channels of its first part."""
    joint: tuple[tuple[str, ...], ...] = ()
    """Layers of one input that other engines have as one, so that they share what a whole tensor has one of."""


class Recipe(Settings):
    """Everything that decides what a quantized model is: settings for all layers, and rules; later rules win."""

    name: str
    description: str = ""
    keep: Literal["family", "none"] = "family"
    """`family`: the layers that the model's family keeps, and the splits that it has, before all rules of one's own."""
    engine: str | None = None
    """The engine that the model is for: inputs are rounded as its kernel rounds them, and with `keep: family` layers
    that it cannot take stay in high precision."""
    weights: str = "fp4_e2m1"
    activations: str = NO_FORMAT
    granularity: str = "group:64"
    activation_granularity: str = "token"
    activation_scale: str = ONLINE
    activation_rule: str = "absmax"
    activation_center: str = NO_FORMAT
    scale: str = "absmax"
    store: str = "bf16"
    rounding: Rounding = Rounding()
    calibration: Calibration = Calibration()
    learning: Learning = Learning()
    transforms: list[Transformation] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _goes_together(self) -> "Recipe":
        """Refuse settings that cannot go together, for all layers and for the layers of each rule alone."""
        from dmquant.grids import grid_type
        from dmquant.scaling import BLOCK_FORMATS

        for rule in (self, *self.rules):
            merged = self._merged([rule])
            if merged.scale == "lean" and not self.rounding.needs_moments:
                raise UsageError("scale: lean is fitted to the errors of rounding: gptq, and there is no other here")
            if merged.weights != NO_FORMAT and merged.weights not in BLOCK_FORMATS:
                grid_type(merged.store).check(merged.weights, merged.granularity, merged.scale)
            if self.engine and (merged.candidates or merged.activation_candidates):
                raise UsageError("an engine runs the formats that are named: leave out candidates, or engine")
            if merged.store == "table" and merged.candidates:
                raise UsageError("a table is no format to choose: leave out candidates, or store: table")
            merged.check_transforms()
            lossy = [one.method for one in merged.transforms or () if one.definition.loses(one.checked)]
            if lossy and not self.rounding.definition.LEARNS:
                raise UsageError(
                    f"transform {lossy[0]} loses what only a rounding that learns, such as adaround, makes up"
                )
        return self

    @property
    def calibrated(self) -> bool:
        """Whether making a model by this recipe takes data."""
        from dmquant.scaling import DATA_RULES

        method = self.rounding.definition
        return (
            method.LEARNS
            or self.rounding.needs_moments
            or any(
                settings.scale in DATA_RULES
                or settings.candidates
                or settings.activation_candidates
                or settings.activation_scale not in (None, ONLINE)
                or any(transform.takes_data for transform in settings.transforms or ())
                for settings in (self, *self.rules)
            )
        )

    @classmethod
    def load(cls, source: str | Path = "rtn", w: str | None = None, a: str | None = None) -> "Recipe":
        """A recipe by name (`dmquant recipes`), by bits (`w4a6`) or from a YAML file; `w` and `a` set its formats.

        Raises UsageError for an unknown name or format, a missing file, and for a file that is not a recipe,
        then with file and line.
        """
        if source in _BITS and source not in recipe_names():
            recipe = cls.load("rtn").with_settings(name=source, **_BITS[source])
        else:
            recipe = read_yaml(cls, _find(str(source)), str(source))
        return recipe.in_formats(w, a)

    @classmethod
    def from_dict(cls, content: Any, source: str) -> "Recipe":
        """The inverse of `to_dict`; UsageError, naming the `source`, for content that is no recipe."""
        return validated(cls, content, lambda place: f"{source}: ")

    def in_formats(self, w: str | None, a: str | None) -> "Recipe":
        """A copy in other formats; None is the recipe's own. Replacing a format drops its candidates; for an engine it
        brings all settings with which the engine runs it, and UsageError lists the formats that it runs."""
        changed: dict[str, Any] = {}
        if self.engine is not None and (w or a):
            return self.with_settings(**engine_of(self.engine).settings(w, a))
        for name, key, candidates in ((w, "weights", "candidates"), (a, "activations", "activation_candidates")):
            if name is not None and format_name(name) != getattr(self, key):
                changed |= {key: name, candidates: None}
        return self.with_settings(**changed)

    def with_settings(self, **settings: Any) -> "Recipe":
        """A copy with some settings replaced, checked like the rest."""
        return validated(Recipe, self.model_dump() | settings, lambda place: "")

    def for_model(self, known: Known) -> "Recipe":
        """A copy with `keep: family` written out as rules for a model; a recipe without it stays as it is."""
        if self.keep == "none":
            return self
        splits = {} if self.engine else known.splits  # no other engine has them
        return self.with_settings(keep="none").keeping(known.keep).splitting(splits)

    def keeping(self, globs: Iterable[str], reason: str | None = None) -> "Recipe":
        """A copy that leaves the named layers in high precision unless one of its own rules says otherwise."""
        rule = Rule(match=list(globs), keep=True, reason=reason)
        return self.with_settings(rules=[rule, *self.rules]) if rule.match else self

    def splitting(self, channels: Mapping[str, int]) -> "Recipe":
        """A copy in which each of these layers has the given `split` unless one of its own rules says otherwise."""
        splits = dict.fromkeys(channels.values())
        rules = [Rule(match=[name for name in channels if channels[name] == split], split=split) for split in splits]
        return self.with_settings(rules=[*rules, *self.rules]) if rules else self

    def settings_by_layer(self, names: Iterable[str]) -> dict[str, Settings | None]:
        """The settings of layers, all filled in; None for one that stays in high precision. By the rules alone."""
        rules = [rule for rule in self.rules if rule.component is None]
        matcher = Matcher([rule.match for rule in rules])
        settings: dict[str, Settings | None] = {}
        for name in names:
            matching = [rules[index] for index in matcher.matching(name)]
            keep = next((rule.keep for rule in reversed(matching) if rule.keep is not None), False)
            merged = self._merged(matching)
            settings[name] = None if keep or merged.weights == NO_FORMAT else merged
        return settings

    def _merged(self, rules: Iterable[Settings]) -> Settings:
        """The recipe's own settings under those of rules, of which later ones win."""
        merged = {key: getattr(self, key) for key in Settings.model_fields}
        for rule in rules:
            merged |= {key: value for key in merged if (value := getattr(rule, key)) is not None}
        return Settings.model_construct(**merged)

    def to_dict(self) -> dict[str, Any]:
        """The recipe in plain JSON types, without unset settings, and without data settings where it takes no data."""
        unused = set() if self.calibrated else {"calibration", "learning"}
        return self.model_dump(exclude_none=True, exclude=unused)

    def save(self, path: str | Path) -> None:
        """Write as YAML; `Recipe.load(path)` gives an equal recipe."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), "utf-8")


def recipe_names() -> list[str]:
    """Names of the recipes that come with dmquant."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


def bits_names() -> list[str]:
    """Names of the data-free recipes by bits, such as `w4a6`."""
    names = [f"w{w}a{a}" for w in _FLOATS for a in _FLOATS if w <= a and w < 16]
    return [name for name in names if name not in recipe_names()]


def _find(source: str):
    if source in recipe_names():
        return _FOLDER / f"{source}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json") or "/" in source:
        if not path.is_file():
            raise UserError(f"no recipe file {source}")
        return path
    raise unknown(
        "recipe",
        source,
        [*recipe_names(), *bits_names()],
        "`dmquant recipes` lists them; --w and --a set other formats",
    )
