"""The methods that a recipe names, each with options of its own."""

from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dmquant.errors import UsageError
from dmquant.yaml_models import problem


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
            said = problem(first, method.Options)
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

    @property
    def takes_data(self) -> bool:
        """Whether it is fitted to calibration data."""
        method = self.module(self.method)
        return method.takes_data(method.Options.model_validate(self.options))


class Rounding(Method):
    """A method of dmquant.rounding."""

    method: str = "nearest"

    @staticmethod
    def module(name: str) -> ModuleType:
        from dmquant.rounding import get_method

        return get_method(name)
