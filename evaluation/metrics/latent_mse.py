"""Latent MSE: mean squared difference of the final latents of every pair."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dmquant.errors import UserError
from dmquant.evaluation.metrics.kind import Kind
from dmquant.evaluation.result import Metric

if TYPE_CHECKING:
    from dmquant.evaluation.metrics.scored_images import ScoredImages


def latent_mse(scored: "ScoredImages") -> Metric:
    """Mean squared difference of the pairs' final latents, in the units of the sampler (before the VAE's scaling)."""
    import torch

    from dmquant.evaluation.metrics.pairs import flagged_names, in_shares
    from dmquant.evaluation.metrics.summary import summarize

    def differences(pairs: Sequence[tuple[Path, Path]]) -> Iterator[float | list[Path]]:
        for done, paths in enumerate(pairs, start=1):
            yield latent_difference(*paths)
            scored.progress("latents", done, len(pairs))

    found = in_shares(list(scored.pairs.paths), differences)
    absent = Counter(path.parent for lacking in found if isinstance(lacking, list) for path in lacking)
    if absent:
        folder, count = absent.most_common(1)[0]
        return Metric.not_computed(
            f"{count} of {len(found)} images in {folder.name} have no final latents beside them; a run with "
            "latent_mse named in --metrics makes those images again"
        )
    values = torch.tensor(found, dtype=torch.float64)
    if not values.isfinite().all():
        names = flagged_names(scored.pairs, (~values.isfinite()).tolist())
        return Metric.not_computed(f"{names} have NaN or infinity in their final latents")
    return summarize(values, LATENT_MSE.better)


def latent_difference(reference_path: Path, path: Path) -> float | list[Path]:
    """The mean squared difference of the latents beside two images, or those images that have none.

    Raises UserError for latents of unequal shapes.
    """
    from dmquant.evaluation.final_latents import read_latent
    from dmquant.evaluation.png import read_key

    reference, latent = (read_latent(file, read_key(file)) for file in (reference_path, path))
    if reference is None or latent is None:
        return [file for file, found in ((reference_path, reference), (path, latent)) if found is None]
    if latent.shape != reference.shape:
        raise UserError(f"the final latents of {path} and {reference_path} differ in size: generate both at one size")
    return float((latent.double() - reference.double()).square().mean())


LATENT_MSE = Kind(
    name="latent_mse",
    function=latent_mse,
    title="Latent MSE",
    digits="#.3g",  # from 1e-6 to 1
    better="lower",
    needs=frozenset({"reference", "latents"}),
    per_image=True,
    default=True,
)
