"""Recipes: which layers of a model become which format, and how. YAML or JSON, checked when read."""

import fnmatch
import importlib.resources
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dmquant.errors import UsageError, unknown

NO_FORMAT = ("none", "bf16")  # leave alone
ONLINE = "online"
_BITS = re.compile(r"w(\d+)a(\d+)")
_FLOAT_OF_BITS = {4: "fp4", 6: "fp6", 8: "fp8", 16: "none"}


class Method(BaseModel):
    """A method of a package by name, and that method's own options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str

    @staticmethod
    def module(name: str) -> ModuleType:
        """The method of this name; UsageError where there is none."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _known_options(self) -> "Method":
        method = self.module(self.method)
        try:
            method.Options.model_validate(self.options)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"] if first["type"] != "extra_forbidden" else ()))
            said = _in_words(first, method.Options)
            raise UsageError(f"{option}: {said}" if option else said) from None
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What was set of the method's own options."""
        return dict(self.model_extra or {})


class Transformation(Method):
    """A method of dmquant.transforms."""

    @staticmethod
    def module(name: str) -> ModuleType:
        from dmquant.transforms import get_method

        return get_method(name)


class Settings(BaseModel):
    """What can be set for a whole model or, in a rule, for some of its layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str | None = None
    activations: str | None = None
    granularity: str | None = None
    activation_granularity: str | None = None
    activation_scale: str | None = None
    """`online`: from the data, at run time; `static:R`: fixed at calibration, one for each of R timestep ranges."""
    scale: str | None = None
    store: str | None = None
    candidates: list[str] | None = None
    """Formats of one size: calibration takes for each layer the one of least output error."""
    activation_candidates: list[str] | None = None
    """Likewise for the layer's input."""
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others get scales of their own; 0: it is not."""
    transforms: list[Transformation] | None = None
    """Exact changes before quantizing, in whatever order they are named; an empty list in a rule: none."""

    @field_validator("weights", "activations")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        """Checked here, where the file and line are known; torch is imported only for this."""
        from dmquant.formats import get_format
        from dmquant.scaling import BLOCK_FORMATS

        if name is not None and name not in NO_FORMAT and name.lower() not in BLOCK_FORMATS:
            get_format(name)
        return name

    @field_validator("candidates", "activation_candidates")
    @classmethod
    def _known_formats(cls, names: list[str] | None) -> list[str] | None:
        from dmquant.formats import get_format

        formats = [get_format(name) for name in names or ()]
        if len({fmt.bits for fmt in formats}) > 1:
            raise UsageError("candidates differ in bits: the one with more would always win")
        return None if names is None else [fmt.name for fmt in formats]

    @field_validator("activation_scale")
    @classmethod
    def _known_activation_scale(cls, text: str | None) -> str | None:
        from dmquant.activations import parse_ranges

        if text is not None:
            parse_ranges(text)
        return text

    @field_validator("granularity", "activation_granularity")
    @classmethod
    def _known_granularity(cls, text: str | None) -> str | None:
        from dmquant.scaling import Granularity

        return text if text is None else str(Granularity.parse(text))

    @field_validator("scale")
    @classmethod
    def _known_rule(cls, name: str | None) -> str | None:
        from dmquant.scaling import DATA_RULES, RULES, check_choice

        return name if name is None else check_choice("scale rule", name, (*RULES, *DATA_RULES))

    @field_validator("store")
    @classmethod
    def _known_store(cls, name: str | None) -> str | None:
        from dmquant.scaling import check_choice
        from dmquant.stores import STORES, TABLES

        return name if name is None else check_choice("scale storage", name, (*STORES, *TABLES))

    def check_transforms(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and options of the transforms; UsageError where these settings cannot go together."""
        from dmquant.transforms import get_method

        chosen = [(transform.method, transform.options) for transform in self.transforms or ()]
        names = [name for name, _ in chosen]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"transform {name} is named twice for the same layers: set it once")
            if not get_method(name).storage.CHANGES_INPUT:
                continue
            if self.activation_scale not in (None, ONLINE):
                raise UsageError(
                    f"transform {name} changes the input that is quantized, and static activation scales are observed "
                    "on the input as it was: use activation_scale: online"
                )
            if self.activation_candidates:
                raise UsageError(
                    f"transform {name} changes the input that is quantized, and activation_candidates are tried on the "
                    "input as it was: name one format in activations"
                )
        return chosen


class Rule(Settings):
    """Settings for the layers whose module name matches a glob; `keep` leaves them in high precision."""

    match: str | list[str]
    keep: bool | None = None

    def matches(self, name: str) -> bool:
        globs = [self.match] if isinstance(self.match, str) else self.match
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


class Rounding(Method):
    """A method of dmquant.rounding."""

    method: str = "nearest"

    @staticmethod
    def module(name: str) -> ModuleType:
        from dmquant.rounding import get_method

        return get_method(name)


class Calibration(BaseModel):
    """Which calls of the full-precision backbone are kept to calibrate on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = Field(default=128, ge=2)
    steps_per_prompt: int = Field(default=10, ge=1)
    sampler: Literal["uniform", "stratified", "importance"] = "stratified"
    held_out: float = Field(default=0.125, gt=0, lt=1)
    """Share of the prompts that nothing is learned from; what was learned is judged on them."""
    seed: int = Field(default=0, ge=0)


class Learning(BaseModel):
    """How the roundings of a unit are learned, whatever the rounding method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: Literal["layer", "block", "window"] = "block"
    window: int = Field(default=2, ge=2)
    """Blocks a window; windows overlap by all but one block. Only for unit: window."""
    iterations: int = Field(default=1000, ge=0)
    batch_size: int = Field(default=16, ge=1)
    """Backbone calls a step; each holds both guidance branches."""
    learning_rate: float = Field(default=0.1, gt=0)
    full_precision_inputs: float = Field(default=0.0, ge=0, le=1)
    """Share of a unit's input elements that come from full precision instead of the quantized units before it."""
    quantize_activations: bool = True
    """Whether activations are quantized while roundings are learned."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    checks: int = Field(default=5, ge=1)
    """How often the hard-rounded unit is tried on held-out data; the best of these is kept."""
    seed: int = Field(default=0, ge=0)


class Recipe(Settings):
    """Everything that decides what a quantized model is: settings for all layers, and rules; later rules win."""

    name: str
    description: str = ""
    weights: str = "fp4"
    activations: str = "none"
    granularity: str = "group:64"
    activation_granularity: str = "token"
    activation_scale: str = ONLINE
    scale: str = "absmax"
    store: str = "bf16"
    rounding: Rounding = Rounding()
    calibration: Calibration = Calibration()
    learning: Learning = Learning()
    transforms: list[Transformation] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)

    @model_validator(mode="after")
    def _goes_together(self) -> "Recipe":
        """Refuse what cannot go together, for all layers and for those of each rule alone."""
        from dmquant.grids import grid_type
        from dmquant.rounding import get_method
        from dmquant.scaling import BLOCK_FORMATS

        for rule in (self, *self.rules):
            set_by_rule = {key: value for key in Settings.model_fields if (value := getattr(rule, key)) is not None}
            merged = {key: getattr(self, key) for key in Settings.model_fields} | set_by_rule
            if merged["scale"] == "lean" and not get_method(self.rounding.method).NEEDS_MOMENTS:
                raise UsageError("scale: lean is fitted to the errors of rounding: gptq, and there is no other here")
            if merged["weights"] not in NO_FORMAT and merged["weights"].lower() not in BLOCK_FORMATS:
                grid_type(merged["store"]).check(merged["weights"], merged["granularity"], merged["scale"])
            if merged["store"] == "table" and merged["candidates"]:
                raise UsageError("a table is no format to choose: leave out candidates, or store: table")
            Settings.model_construct(**merged).check_transforms()
        return self

    @property
    def calibrated(self) -> bool:
        """Whether making a model by this recipe takes data."""
        from dmquant.rounding import get_method
        from dmquant.scaling import DATA_RULES

        everywhere = [self, *self.rules]
        method = get_method(self.rounding.method)
        transforms = [transform for settings in everywhere for transform in settings.transforms or ()]
        return (
            method.LEARNS
            or method.NEEDS_MOMENTS
            or any(map(_takes_data, transforms))
            or any(
                settings.scale in DATA_RULES
                or settings.candidates
                or settings.activation_candidates
                or settings.activation_scale not in (None, ONLINE)
                for settings in everywhere
            )
        )

    @classmethod
    def load(cls, source: str | Path = "rtn", w: str | None = None, a: str | None = None) -> "Recipe":
        """A recipe by name (`dmquant recipes`), by bits (`w4a6`) or from a YAML file; `w` and `a` set its formats.

        Raises UsageError for an unknown name or format, a missing file, and for a file that is not a recipe,
        then with file and line.
        """
        formats = {"weights": w, "activations": a}
        if bits := _BITS.fullmatch(str(source)):
            named = dict(zip(formats, map(_float_of_bits, bits.groups()), strict=True))
            recipe = cls.load("rtn").with_settings(name=str(source), **named)
        else:
            path = _find(str(source))
            recipe = parse_yaml(cls, path.read_text(), str(source))
        changed = {key: name for key, name in formats.items() if name is not None and name != getattr(recipe, key)}
        if "weights" in changed:  # the candidates stood for the recipe's own format
            changed["candidates"] = None
        if "activations" in changed:
            changed["activation_candidates"] = None
        return recipe.with_settings(**changed)

    def with_settings(self, **settings: Any) -> "Recipe":
        """A copy with some settings replaced, checked like the rest."""
        try:
            return Recipe.model_validate(self.model_dump() | settings)
        except ValidationError as error:
            raise UsageError(_in_words(error.errors()[0], Recipe)) from None

    def keeping(self, globs: Iterable[str]) -> "Recipe":
        """A copy that leaves the named layers in high precision unless one of its own rules says otherwise."""
        globs = list(globs)
        return self.with_settings(rules=[Rule(match=globs, keep=True), *self.rules]) if globs else self

    def splitting(self, channels: Mapping[str, int]) -> "Recipe":
        """A copy in which each of these layers has the given `split` unless one of its own rules says otherwise."""
        layers: dict[int, list[str]] = {}
        for name, split in channels.items():
            layers.setdefault(split, []).append(name)
        rules = [Rule(match=names, split=split) for split, names in layers.items()]
        return self.with_settings(rules=[*rules, *self.rules]) if rules else self

    def settings_for(self, name: str) -> "Settings | None":
        """The settings of one layer, all filled in; None where it stays in high precision."""
        merged = {key: getattr(self, key) for key in Settings.model_fields}
        keep = False
        for rule in self.rules:
            if rule.matches(name):
                keep = keep if rule.keep is None else rule.keep
                merged |= {key: value for key in merged if (value := getattr(rule, key)) is not None}
        return None if keep or merged["weights"] in NO_FORMAT else Settings.model_construct(**merged)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what was left at its default in rules or has no meaning without data."""
        unused = set() if self.calibrated else {"calibration", "learning"}
        return self.model_dump(exclude_none=True, exclude=unused)

    def save(self, path: str | Path) -> None:
        """Write as YAML; `Recipe.load(path)` gives an equal recipe."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def recipe_names() -> list[str]:
    """Names of the recipes that come with dmquant."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def bits_names() -> list[str]:
    """Names of the data-free recipes by bits, such as `w4a6`."""
    return [f"w{w}a{a}" for w in _FLOAT_OF_BITS for a in _FLOAT_OF_BITS if w <= a and w < 16]


def parse_yaml(model: type[BaseModel], text: str, source: str) -> Any:
    """`text` as a `model`; a UsageError names the source and line of what is wrong with it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return model.model_validate(yaml.safe_load(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{source}, line {line}: not valid YAML: {error.problem}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        problem = _in_words(first, model)
        raise UsageError(f"{source}, line {_line_of(root, first['loc'])}: {where}: {problem}") from None


def _in_words(error: dict[str, Any], model: type[BaseModel]) -> str:
    if error["type"] == "extra_forbidden":
        in_rule = len(error["loc"]) > 1
        fields = (Rule if in_rule else model).model_fields
        return str(unknown("key", str(error["loc"][-1]), fields, f"known: {', '.join(fields) or 'none'}"))
    if error["type"] == "missing":
        return "this key is required"
    if error["type"] == "value_error":  # a UsageError of ours, raised while checking
        return str(error["ctx"]["error"])
    return f"{error['msg']} (got {error['input']!r})"


def _line_of(node: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    """Line (from 1) of the node at a pydantic location, or of the deepest part of it that exists."""
    line = node.start_mark.line + 1 if node else 1
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line


def _takes_data(transform: Transformation) -> bool:
    method = transform.module(transform.method)
    return method.takes_data(method.Options.model_validate(transform.options))


def _float_of_bits(bits: str) -> str:
    if int(bits) not in _FLOAT_OF_BITS:
        raise UsageError(f"no floating-point format is implied by {bits} bits: name one with --w and --a")
    return _FLOAT_OF_BITS[int(bits)]


def _folder():
    return importlib.resources.files("dmquant.configs") / "recipes"


def _find(source: str):
    if source in recipe_names():
        return _folder() / f"{source}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml", ".json") or "/" in source:
        if not path.is_file():
            raise UsageError(f"no recipe file {source}")
        return path
    raise unknown("recipe", source, [*recipe_names(), *bits_names()], "`dmquant recipes` lists them")
