"""What a recipe says of some layers: formats, scales and transforms, each checked by name."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationInfo, field_validator

from dmquant.errors import UsageError, check_choice
from dmquant.methods import Transformation

NO_FORMAT = "none"  # leave alone
_ALSO_NO_FORMAT = "bf16"
ONLINE = "online"


def format_name(name: str) -> str:
    """The one name of a format, whatever it was called: `FP4` is fp4_e2m1, `bf16` none; UsageError for no format."""
    from dmquant.formats import get_format
    from dmquant.scaling import BLOCK_FORMATS

    lower = name.lower()
    if lower in (NO_FORMAT, _ALSO_NO_FORMAT):
        return NO_FORMAT
    return lower if lower in BLOCK_FORMATS else get_format(name).name


def _one_size(names: list[str]) -> list[str]:
    """The names of candidate formats; UsageError where they differ in bits."""
    from dmquant.formats import get_format

    formats = [get_format(name) for name in names]
    if len({fmt.bits for fmt in formats}) > 1:
        raise UsageError("candidates differ in bits: the one with more would always win")
    return [fmt.name for fmt in formats]


def _checks() -> dict[str, Callable[[Any], Any]]:
    """What gives each setting its one name, or raises a UsageError; torch is imported only for this."""
    from dmquant.activations import parse_ranges
    from dmquant.scaling import DATA_RULES, RULES, Granularity
    from dmquant.stores import STORES, TABLES

    return {
        "weights": format_name,
        "activations": format_name,
        "candidates": _one_size,
        "activation_candidates": _one_size,
        "granularity": lambda text: str(Granularity.parse(text)),
        "activation_granularity": lambda text: str(Granularity.parse(text)),
        "activation_scale": lambda text: text if parse_ranges(text) else ONLINE,
        "scale": lambda name: check_choice("scale rule", name, (*RULES, *DATA_RULES)),
        "store": lambda name: check_choice("scale storage", name, (*STORES, *TABLES)),
    }


class Settings(BaseModel, extra="forbid", frozen=True):
    """What can be set for a whole model or, in a rule, for some of its layers."""

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

    @field_validator("*")
    @classmethod
    def _known(cls, value: Any, info: ValidationInfo) -> Any:
        """Checked here, where the file and line are known."""
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
