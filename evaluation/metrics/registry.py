"""All metrics by name, in the order in which they are listed and printed.

A package of one's own adds one with an entry point in the group `dmquant.metrics` that names its `Kind`.
"""

import warnings
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from dmquant.errors import UserError, unknown
from dmquant.evaluation.metrics.clip_score import CLIP_SCORE
from dmquant.evaluation.metrics.cmmd import CMMD_FP, CMMD_REAL
from dmquant.evaluation.metrics.fid import FID_FP, FID_REAL
from dmquant.evaluation.metrics.hpsv2 import HPSV2, HPSV21
from dmquant.evaluation.metrics.kid import KID_FP, KID_REAL
from dmquant.evaluation.metrics.kind import Kind
from dmquant.evaluation.metrics.latent_mse import LATENT_MSE
from dmquant.evaluation.metrics.lpips import LPIPS, LPIPS_VGG
from dmquant.evaluation.metrics.psnr import PSNR
from dmquant.evaluation.metrics.ssim import MS_SSIM, SSIM

GROUP = "dmquant.metrics"
WHERE = {"clip": " where the model comes with a CLIP model", "real": " with --real"}  # a default metric is taken
BUILT_IN = (
    *(PSNR, SSIM, MS_SSIM, LPIPS, LPIPS_VGG, LATENT_MSE),
    *(FID_FP, FID_REAL, KID_FP, KID_REAL, CMMD_FP, CMMD_REAL),
    *(CLIP_SCORE, HPSV2, HPSV21),
)


def known_kinds(built_in: Iterable[Kind], added: Iterable[EntryPoint]) -> dict[str, Kind]:
    """The metrics by name; an added one that cannot be loaded, or has a name that is taken, is left out with a warning.

    What a stranger's package breaks must not take `dmquant --help` with it.
    """
    kinds = {kind.name: kind for kind in built_in}
    for entry in added:
        try:
            kind = entry.load()
            if not isinstance(kind, Kind):
                raise TypeError(f"{entry.value} is no Kind of dmquant.evaluation.metrics.kind")
            if kind.name in kinds:
                raise ValueError(f"a metric of the name {kind.name} is there already")
        except Exception as error:
            warnings.warn(f"the metric '{entry.name}' is left out: {error}", stacklevel=2)
        else:
            kinds[kind.name] = kind
    return kinds


METRICS = known_kinds(BUILT_IN, entry_points(group=GROUP))


def get_kind(name: str) -> Kind:
    """The metric of that name; raises UserError where a report has one of a package that is not installed here."""
    if name not in METRICS:
        raise UserError(f"the metric '{name}' is not known here: install the package that brought it, and try again")
    return METRICS[name]


def check_names(names: Iterable[str]) -> None:
    """Raise UsageError, with the nearest name, unless every one of `names` is a metric."""
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS, f"the metrics are {', '.join(METRICS)}")


def needing(*needs: str) -> list[str]:
    """Names of the metrics that need any of `needs`."""
    return [kind.name for kind in METRICS.values() if kind.needs.intersection(needs)]


def all_names(real: bool) -> tuple[str, ...]:
    """Names of all metrics; those that need real images only where there are some."""
    return tuple(name for name, kind in METRICS.items() if real or "real" not in kind.needs)


def default_names(real: bool, own_clip: bool) -> tuple[str, ...]:
    """Names of the metrics computed by default: nothing that may have to be downloaded.

    So what needs a CLIP model is among them only where the pipeline comes with one of its own.
    """
    listed = (name for name in all_names(real) if METRICS[name].default)
    return tuple(name for name in listed if own_clip or "clip" not in METRICS[name].needs)


def list_for_help() -> str:
    """The names of all metrics, for the help of --metrics."""
    return f"{', '.join(all_names(real=False))}, and with --real {', '.join(needing('real'))}"


def defaults_for_help() -> str:
    """The default metrics and where each group of them is taken, for the help of --metrics."""
    groups: dict[str, list[str]] = {}
    for name in default_names(real=True, own_clip=True):
        where = "".join(words for need, words in WHERE.items() if need in METRICS[name].needs)
        groups.setdefault(where, []).append(name)
    return "; ".join(", ".join(names) + where for where, names in groups.items())
