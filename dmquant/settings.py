"""What a recipe says of some layers: formats, scales and transforms, each checked by name."""

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from dmquant.errors import UsageError
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
        return name if name is None else format_name(name)

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
