"""The results of a run, as data: metrics that describe themselves, and the report that holds them.

Everything here goes into report.json and comes back equal. Version 1 of that file has the keys that `Report.to_json`
writes; releases may add keys to it, so a reader ignores those it does not know.
"""

import functools
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from dmquant.errors import UserError

VERSION = 1
T = TypeVar("T")
_STRICT = {"strict": True, "revalidate_instances": "always"}


class UnavailableError(UserError):
    """The weights or the code that a metric looks through are not at hand; the message says what and how to get it."""


@dataclass(frozen=True)
class Backbone:
    """The network that a metric looks through: its name and the SHA-256 of its weights file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Metric:
    """A metric of one set of images.

    `value` is None exactly when the metric was not computed; `reason` then says what is missing and how to get it.
    `low` and `high` bound the 95 % bootstrap interval over images where one exists. `images` is the number of images
    scored, `note` a remark to read before comparing the number with another. A metric that is a mean over images has
    their `median` and the mean of the `worst` 5 % beside it, and `values`, one for each image in the order of the file
    names, which go to scores.csv and not into report.json.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    images: int = 0
    backbone: Backbone | None = None
    reason: str | None = None
    note: str | None = None
    median: float | None = None
    worst: float | None = None
    values: tuple[float, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.value is None) == (self.reason is None):
            raise ValueError("a metric has either a value or the reason why it has none")

    @classmethod
    def not_computed(cls, reason: str) -> "Metric":
        """A metric without a value, and why."""
        return cls(None, reason=reason)

    def to_json(self) -> dict[str, Any]:
        """The metric as it stands in report.json."""
        if self.value is None:
            return {"value": None, "reason": self.reason}
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            **({} if self.median is None else {"median": self.median, "worst": self.worst}),
            "images": self.images,
            "backbone": None if self.backbone is None else vars(self.backbone).copy(),
            **({} if self.note is None else {"note": self.note}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Metric":
        """The inverse of `to_json`."""
        backbone = data.get("backbone")
        return _build(cls, {**data, "backbone": backbone and _build(Backbone, backbone)})


@dataclass(frozen=True)
class BatchMates:
    """PSNR in dB of an image made alone to the same one made in a batch of `images`; None where the two are equal."""

    images: int
    psnr: float | None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of one variant of the backbone, full precision or quantized.

    `size_bytes` is the backbone's on disk, `seconds` the time of each stage, `peak_memory_bytes` the highest memory
    use while generating, `images` the folder of its images relative to the report. `batch_mates` is None where each
    image is made alone, and where it was not measured.
    """

    size_bytes: int
    images: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    batch_mates: BatchMates | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reference(Measured):
    """The full-precision pipeline that everything is compared with; its `size_bytes` count 16 bits for each weight."""

    name: str = "full precision"
    dtype: str
    images: str = "images/fp"


@dataclass(frozen=True)
class LayerError:
    """Errors of one quantized layer with `bits` for each weight.

    `weight_error` is the squared error of its weight over the weight's square. `output_error` is the same for its
    output in the running backbone, on full-precision inputs of the backbone; errors of the layers before are included.
    """

    name: str
    kind: str
    format: str
    bits: float
    weight_error: float
    output_error: float | None = None


@dataclass(frozen=True)
class StepError:
    """Mean squared difference of the latents after one step of the sampler, and the mean square of the latents."""

    step: int
    timestep: float
    latent_mse: float
    latent_power: float


@dataclass(frozen=True, kw_only=True)
class RecipeResult(Measured):
    """The pipeline quantized by one recipe; `bits_per_weight` counts scales and what stays in 16 bit.

    `relative_time` is the time of an image over full precision's, None where the two were not measured together, and
    `quantize_peak_memory_bytes` the highest memory use while the model was made.
    `settings` (granularity, rounding, ...) are flat and printed as they are; `recipe` is the whole recipe, `layers` and
    `steps` are where its error comes from, as far as that was measured.
    """

    weights: str
    activations: str
    bits_per_weight: float
    relative_time: float | None = None
    quantize_peak_memory_bytes: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    images: str = "images/quantized"
    recipe: dict[str, Any] = field(default_factory=dict)
    layers: list[LayerError] = field(default_factory=list)
    steps: list[StepError] = field(default_factory=list)


ERRORS = {"layers": LayerError, "steps": StepError}


@dataclass(frozen=True, kw_only=True)
class Report:
    """A model, its full-precision reference, and the result of each recipe.

    `prompts` are in the order of the images; `settings` (seed, steps, guidance, size, device, ...) and `versions`
    (of the packages used) are flat and printed as they are; `command` is the command line that makes it all again.
    `inputs` are the folders, relative to the report, of images that went into the pipeline, by what they are.
    """

    model: str
    reference: Reference
    recipes: dict[str, RecipeResult]
    prompts: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    inputs: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """ValueError where a field holds another type than it declares, or what JSON cannot hold."""
        try:
            _adapter().validate_python(self)
        except ValueError as error:  # pydantic's
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        json.dumps(self.to_json(), allow_nan=False)

    def to_json(self) -> dict[str, Any]:
        """The report as the object that report.json holds."""
        return {
            "version": VERSION,
            "model": self.model,
            "reference": _measured_to_json(self.reference),
            "recipes": {name: _measured_to_json(recipe) for name, recipe in self.recipes.items()},
            "prompts": self.prompts,
            "settings": self.settings,
            "versions": self.versions,
            "command": self.command,
            **({"inputs": self.inputs} if self.inputs else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Report":
        """The inverse of `to_json`."""
        return cls(
            model=data["model"],
            reference=_measured_from_json(Reference, data["reference"]),
            recipes={name: _measured_from_json(RecipeResult, recipe) for name, recipe in data["recipes"].items()},
            prompts=data["prompts"],
            settings=data["settings"],
            versions=data["versions"],
            command=data.get("command", ""),
            inputs=data.get("inputs", {}),
        )


def _measured_to_json(measured: Measured) -> dict[str, Any]:
    metrics = {name: metric.to_json() for name, metric in measured.metrics.items()}
    mates = measured.batch_mates and asdict(measured.batch_mates)
    facts = {**vars(measured), "batch_mates": mates, "metrics": metrics}
    if not isinstance(measured, RecipeResult):
        return facts
    return facts | {name: [asdict(error) for error in getattr(measured, name)] for name in ERRORS}


def _measured_from_json(cls: type[T], data: dict[str, Any]) -> T:
    metrics = {name: Metric.from_json(metric) for name, metric in data["metrics"].items()}
    errors = {name: [_build(kind, error) for error in data[name]] for name, kind in ERRORS.items() if name in data}
    mates = data.get("batch_mates")
    return _build(cls, {**data, "batch_mates": mates and _build(BatchMates, mates), "metrics": metrics, **errors})


def _build(cls: type[T], data: dict[str, Any]) -> T:
    """`cls` from those items of `data` that are its fields."""
    return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})


@functools.cache
def _adapter() -> Any:
    """pydantic's of a report; it is imported here, so that `dmquant --help` does without."""
    from pydantic import TypeAdapter

    for kind in (Backbone, BatchMates, Metric, Reference, RecipeResult, LayerError, StepError, Report):
        kind.__pydantic_config__ = _STRICT
    return TypeAdapter(Report)
