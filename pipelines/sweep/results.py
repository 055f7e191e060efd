"""The results of a sweep, as data: a row for each trial, with costs and quality, and the rows that no other beats."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.pareto_front import pareto_front
from dmquant.evaluation.result import Metric
from dmquant.evaluation.scores_csv import text_cell
from dmquant.host.text import without_folders
from dmquant.pipelines.sweep.costs import Costs
from dmquant.pipelines.sweep.space import Trial, bits_in
from dmquant.pipelines.sweep.trial import Failure

VERSION = 1
BITS = "bits_per_quantized_weight"
COSTS = {BITS: "bits", "bit_operations": "ops", "area": "area"}
"""The costs that quality is held against, and a word for each."""


@dataclass(frozen=True)
class Row:
    """A trial, what its arithmetic costs, and the record that it left or why there is none."""

    trial: Trial
    costs: Costs
    outcome: dict[str, Any] | Failure

    @property
    def failed(self) -> bool:
        return isinstance(self.outcome, Failure)

    def metric(self, name: str) -> Metric | None:
        return None if self.failed else Metric.from_json(self.outcome["metrics"][name])

    def cost(self, name: str) -> float | None:
        """The cost of this name, one of COSTS; None where it is not known."""
        return self.measured(BITS) if name == BITS else getattr(self.costs, name)

    def measured(self, name: str) -> Any:
        """A number of the record; None where the trial failed."""
        return None if self.failed else self.outcome[name]

    def to_json(self, fronts: dict[str, set[str]]) -> dict[str, Any]:
        """The row as it stands in sweep.json; `fronts` come from `pareto_fronts`."""
        weights, activations = self.trial.settings.formats
        measured = (BITS, "bits_per_weight", "size_bytes")
        return {
            "name": self.trial.name,
            "technique": self.trial.technique,
            "weights": weights,
            "activations": activations,
            "weight_bits": bits_in(weights),
            "activation_bits": bits_in(activations),
            "kind": self.trial.kind,
            **{name: self.measured(name) for name in measured},
            "multiply_accumulates": self.costs.multiply_accumulates,
            "bit_operations": self.costs.bit_operations,
            "multiplier_cells": self.costs.multiplier_cells,
            "accumulator_cells": self.costs.accumulator_cells,
            "area": self.costs.area,
            "pareto": [word for cost, word in COSTS.items() if self.trial.name in fronts[cost]],
            "metrics": {} if self.failed else self.outcome["metrics"],
            "seconds": {} if self.failed else self.outcome["seconds"],
            "peak_memory_bytes": self.measured("peak_memory_bytes"),
            "peak_memory_of": self.measured("peak_memory_of"),
            "images_with_nan": self.measured("not_finite"),
            "threads": self.measured("threads"),
            "error": without_folders(self.outcome.reason) if self.failed else None,
        }


def sorted_rows(rows: Sequence[Row], metric: str) -> list[Row]:
    """By bits a weight, then bit operations, the better ones first; those that failed come last."""
    sign = -METRICS[metric].sign

    def place(row: Row) -> tuple:
        quality = row.metric(metric)
        value = None if quality is None else quality.value
        last = float("inf") if value is None else sign * value
        bits = row.cost(BITS) or 0.0
        return row.failed, bits, row.costs.bit_operations, last, row.trial.name

    return sorted(rows, key=place)


def pareto_fronts(rows: Sequence[Row], metric: str) -> dict[str, set[str]]:
    """By cost, the names of the trials than which none of lower or equal cost has a better `metric`."""
    sign = METRICS[metric].sign
    scored = [row for row in rows if not row.failed and row.metric(metric).value is not None]
    fronts = {}
    for cost in COSTS:
        known = [row for row in scored if row.cost(cost) is not None]
        qualities = [sign * row.metric(metric).value for row in known]
        front = pareto_front([row.cost(cost) for row in known], qualities)
        fronts[cost] = {known[index].trial.name for index in front}
    return fronts


def as_csv(rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """The rows of sweep.json flat: intervals in columns METRIC_low and METRIC_high, seconds in seconds_STAGE."""
    flat = []
    for row in rows:
        plain = {name: _cell(value) for name, value in row.items() if not isinstance(value, dict | list)}
        values: dict[str, Any] = {"pareto": " ".join(row["pareto"])}
        for name in metrics:
            metric = row["metrics"].get(name, {})
            values |= {name: metric.get("value")}
            values |= {f"{name}_{part}": metric.get(part) for part in ("low", "high", "images")}
        seconds = {
            f"seconds_{stage}": row["seconds"].get(stage) for stage in ("quantize", "generate", "score", "trial")
        }
        error = plain.pop("error")
        flat.append({**plain, **values, **seconds, "error": error})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return text_cell(value) if isinstance(value, str) else value
