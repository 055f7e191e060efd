"""Score one folder of generated images against another, and against real ones."""

from collections.abc import Sequence
from pathlib import Path

from dmquant.evaluation.metrics.registry import METRICS, check_names
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.result import Metric, UnavailableError


def score_pairs(
    reference_dir: Path,
    quantized_dir: Path,
    metrics: Sequence[str] = tuple(METRICS),
    real: Path | None = None,
    networks: Networks | None = None,
    progress: Progress = silent,
    prompts: Sequence[str] | None = None,
) -> dict[str, Metric]:
    """Every metric of `metrics` for the images in `quantized_dir` against those in `reference_dir`.

    Both hold PNG files, equal names being pairs; `real` is a folder of real images; `prompts` has one entry an image,
    in the order of the names, and is what the images carry where it is not given. Pass the same `networks` to several
    calls to load each once and look at each image once. Raises UsageError for an unknown metric, UserError for missing,
    unreadable or unequal images.
    """
    check_names(metrics)
    networks = networks or Networks()
    scored = ScoredImages(Path(quantized_dir), Path(reference_dir), _folder(real), networks, progress, prompts)
    len(scored.pairs)  # a missing counterpart is an error whatever the metrics
    return {name: compute(name, scored) for name in metrics}


def score_reference(
    reference_dir: Path,
    metrics: Sequence[str] = tuple(METRICS),
    real: Path | None = None,
    networks: Networks | None = None,
    progress: Progress = silent,
    prompts: Sequence[str] | None = None,
) -> dict[str, Metric]:
    """Score the full-precision images themselves, by the `metrics` that need no full-precision images.

    Arguments and errors as in `score_pairs`.
    """
    check_names(metrics)
    folder = Path(reference_dir)
    scored = ScoredImages(folder, folder, _folder(real), networks or Networks(), progress, prompts)
    return {name: compute(name, scored) for name in metrics if "reference" not in METRICS[name].needs}


def compute(name: str, scored: ScoredImages) -> Metric:
    """The metric `name` of the images, or the reason why it is not computed; raises UserError for unreadable images."""
    try:
        return METRICS[name].function(scored)
    except UnavailableError as missing:
        return Metric.not_computed(str(missing))


def _folder(path: Path | None) -> Path | None:
    return None if path is None else Path(path)
