"""The methods that a recipe names, each with options of its own."""

import importlib
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError, model_validator

from dmquant.errors import UsageError
from dmquant.yaml_models import problem


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
        """What was set of the method's own options."""
        return dict(self.model_extra or {})


class Transformation(Method):
    """A method of dmquant.transforms."""

    package = "dmquant.transforms"

    @property
    def takes_data(self) -> bool:
        """Whether it is fitted to calibration data."""
        return self.definition.takes_data(self.definition.Options.model_validate(self.options))


class Rounding(Method):
    """A method of dmquant.rounding."""

    package = "dmquant.rounding"
    method: str = "nearest"
