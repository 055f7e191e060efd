"""The metrics: every one a function from `Inputs` to `Metric`, listed in `METRICS` under its name in report.json."""

from collections.abc import Callable

from dmquant.errors import unknown
from dmquant.evaluation.metrics import paired, sets, text
from dmquant.evaluation.metrics.inputs import Inputs
from dmquant.evaluation.result import Metric
from dmquant.evaluation.unavailable import UnavailableError

METRICS: dict[str, Callable[[Inputs], Metric]] = {
    "psnr": paired.psnr,
    "ssim": paired.ssim,
    "ms_ssim": paired.ms_ssim,
    "lpips": paired.lpips,
    "lpips_vgg": paired.lpips_vgg,
    "latent_mse": paired.latent_mse,
    "fid_fp": sets.fid_fp,
    "fid_real": sets.fid_real,
    "kid_fp": sets.kid_fp,
    "kid_real": sets.kid_real,
    "cmmd_fp": sets.cmmd_fp,
    "cmmd_real": sets.cmmd_real,
    "clip_score": text.clip_score,
    "hpsv2": text.hpsv2,
    "hpsv21": text.hpsv21,
}
PER_IMAGE = frozenset({"psnr", "ssim", "ms_ssim", "lpips", "lpips_vgg", "latent_mse", "clip_score", "hpsv2", "hpsv21"})
THROUGH_CLIP = frozenset({"clip_score", "cmmd_fp", "cmmd_real"})
REAL = frozenset({"fid_real", "kid_real", "cmmd_real"})  # these need a folder of real images
WITHOUT_REFERENCE = REAL | {"clip_score", "hpsv2", "hpsv21"}  # these score full precision itself, too


def check_names(names: list[str]) -> None:
    """Raise UsageError, with the nearest name, unless every one of `names` is a metric."""
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS, f"the metrics are {', '.join(METRICS)}")


def compute(name: str, inputs: Inputs) -> Metric:
    """The metric `name` of `inputs`, or the reason why it is not computed; raises UserError for unreadable images."""
    try:
        return METRICS[name](inputs)
    except UnavailableError as missing:
        return Metric.not_computed(str(missing))
