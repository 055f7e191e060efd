"""Settings of layers in a recipe: formats, scales and methods with their options, each checked by name."""

import functools
import importlib
from collections.abc import Callable
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError, ValidationInfo, field_validator, model_validator

from dmquant.errors import LONGEST, UsageError, check_choice
from dmquant.registry import engine_of
from dmquant.yaml_models import problem

NO_FORMAT = "none"  # leave alone
ONLINE = "online"


def format_name(name: str) -> str:
    """The one name of a format, whatever it was called: `FP4` is fp4_e2m1, `bf16` none; UsageError for no format."""
    from dmquant.formats import get_format
    from dmquant.scaling import BLOCK_FORMATS

    lower = name.lower()
    if lower in (NO_FORMAT, "bf16"):
        return NO_FORMAT
    return lower if lower in BLOCK_FORMATS else get_format(name).name


def _one_size(names: list[str]) -> list[str]:
    """The names of candidate formats; UsageError where they differ in bits."""
    from dmquant.formats import get_format

    formats = [get_format(name) for name in names]
    if len({fmt.bits for fmt in formats}) > 1:
        raise UsageError("candidates differ in bits: the one with more would always win")
    return [fmt.name for fmt in formats]


def _recipe_name(name: str) -> str:
    """The name of a recipe; UsageError for one that cannot stand in a table, in a page or on a terminal."""
    if not 0 < len(name.strip()) == len(name) <= LONGEST or not name.isprintable():
        raise UsageError(f"a name is one line of up to {LONGEST} letters, digits and signs, without blanks at its ends")
    return name


@functools.cache
def _checks() -> dict[str, Callable[[Any], Any]]:
    """Functions by setting that return the one name of a value, or raise UsageError; only they import torch."""
    from dmquant.activations import CENTERS, parse_ranges
    from dmquant.scaling import DATA_RULES, ONLINE_RULES, RULES, Granularity
    from dmquant.stores import STORES, TABLES

    granularities = dict.fromkeys(("granularity", "activation_granularity"), lambda text: str(Granularity.parse(text)))
    return granularities | {
        "name": _recipe_name,
        "engine": lambda name: engine_of(name).name,
        "weights": format_name,
        "activations": format_name,
        "candidates": _one_size,
        "activation_candidates": _one_size,
        "activation_scale": lambda text: text if parse_ranges(text) else ONLINE,
        "activation_rule": lambda name: check_choice("activation rule", name, ONLINE_RULES),
        "activation_center": lambda name: check_choice("center of activations", name, CENTERS),
        "scale": lambda name: check_choice("scale rule", name, (*RULES, *DATA_RULES)),
        "store": lambda name: check_choice("scale storage", name, (*STORES, *TABLES)),
    }


class Method(BaseModel, extra="allow", frozen=True):
    """A method of a package by name, and that method's own options."""

    method: str
    package: ClassVar[str]
    """Where the methods are found by name."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"method": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _known_options(self) -> "Method":
        options = self.definition.Options
        try:
            options.model_validate(self.options)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(map(str, first["loc"] if first["type"] != "extra_forbidden" else ()))
            said = problem(first, options)
            raise UsageError(f"{option}: {said}" if option else said) from None
        return self

    @property
    def definition(self) -> Any:
        """The method of this name; UsageError where there is none."""
        return importlib.import_module(self.package).get_method(self.method)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method that were set."""
        return dict(self.model_extra or {})

    @property
    def checked(self) -> BaseModel:
        """All options of the method."""
        return self.definition.Options.model_validate(self.options)


class Transformation(Method):
    """A method of dmquant.transforms."""

    package = "dmquant.transforms"

    @property
    def takes_data(self) -> bool:
        """Whether it is fitted to calibration data."""
        return self.definition.takes_data(self.checked)


class Rounding(Method):
    """A method of dmquant.rounding."""

    package = "dmquant.rounding"
    method: str = "nearest"
    begin: "Rounding | None" = None
    """The method whose codes a method that learns begins with; by default it begins with the float weight."""

    @model_validator(mode="after")
    def _begins(self) -> "Rounding":
        if self.begin and not self.definition.LEARNS:
            raise UsageError(f"begin: rounding {self.method} does not learn, so that it begins with nothing")
        if self.begin and (self.begin.definition.LEARNS or not self.begin.definition.NEEDS_MOMENTS):
            raise UsageError(f"begin: {self.begin.method} is not solved: begin with gptq")
        return self

    @property
    def solver(self) -> "Rounding":
        """The rounding that scales are fitted to, and solved by: what this one begins with, or itself."""
        return self.begin or self

    @property
    def needs_moments(self) -> bool:
        """Whether any part of it takes the second moments of a layer's inputs."""
        return self.solver.definition.NEEDS_MOMENTS


class Objective(Method):
    """A method of dmquant.calib.objectives."""

    package = "dmquant.calib.objectives"
    method: str = "mse"


class Settings(BaseModel, extra="forbid", frozen=True):
    """Settings of a whole model or, in a rule, of some of its layers."""

    weights: str | None = None
    activations: str | None = None
    granularity: str | None = None
    activation_granularity: str | None = None
    activation_scale: str | None = None
    """`online`: from the data, at run time; `static:R`: fixed at calibration, one for each of R timestep ranges."""
    activation_rule: str | None = None
    """How online scales are fitted: `absmax`, `four-over-six`, or `mse`, the least error among many."""
    activation_center: str | None = None
    """`image`: the mean of each channel over the tokens of a row is not quantized; `none`."""
    scale: str | None = None
    store: str | None = None
    candidates: list[str] | None = None
    """Formats of one size: calibration takes for each layer the one of least output error."""
    activation_candidates: list[str] | None = None
    """Candidate formats of the layer's input."""
    split: int | None = None
    """The input is a concatenation: its first `split` channels and the others get scales of their own; 0: it is not."""
    transforms: list[Transformation] | None = None
    """Exact changes before quantizing, in whatever order they are named; an empty list in a rule: none."""

    @field_validator("*")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        """Check a setting here, where the file and line are known."""
        check = _checks().get(info.field_name)
        return check(value) if check and value is not None else value

    def check_transforms(self) -> list[tuple[str, dict[str, Any]]]:
        """Names and options of the transforms; UsageError where these settings cannot go together."""
        from dmquant.transforms import get_method

        chosen = [(transform.method, transform.options) for transform in self.transforms or ()]
        names = [name for name, _ in chosen]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"transform {name} is named twice for the same layers: set it once")
            clash = None
            if self.activation_scale not in (None, ONLINE):
                clash = "static activation scales are observed on the input as it was: use activation_scale: online"
            elif self.activation_candidates:
                clash = "activation_candidates are tried on the input as it was: name one format in activations"
            if clash and get_method(name).storage.CHANGES_INPUT:
                raise UsageError(f"transform {name} changes the input that is quantized, and {clash}")
        return chosen


class Rule(Settings):
    """Settings for the layers whose module name matches a glob; `keep` leaves them in high precision."""

    match: str | list[str]
    component: str | None = None
    """The part of the pipeline, such as `text_encoder`, that the rule is about; by default the backbone."""
    keep: bool | None = None
    reason: str | None = None
    """Why, for people."""
