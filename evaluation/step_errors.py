"""Per-step error: how far from full precision the sampler is after each of its steps."""

from collections.abc import Iterator
from pathlib import Path

import torch

from dmquant.evaluation.png import read_key
from dmquant.evaluation.result import StepError
from dmquant.evaluation.trajectory import SUFFIX, Trajectory, read_trajectory


def step_errors(reference: Path, quantized: Path) -> list[StepError]:
    """The error after every step, mean over the images that have a trajectory in both folders; empty without any.

    Images with NaN or infinity on either side are left out, and so are those that took other steps than the first.
    """
    mse, power, timesteps = [], [], None
    for fp, other in _pairs(Path(reference), Path(quantized)):
        timesteps = fp.timesteps if timesteps is None else timesteps
        if not torch.equal(fp.timesteps, timesteps):
            continue
        exact, got = fp.latents.double().flatten(1), other.latents.double().flatten(1)
        mse.append((got - exact).square().mean(1))
        power.append(exact.square().mean(1))
    if timesteps is None:
        return []
    curves = zip(timesteps.tolist(), _mean(mse), _mean(power), strict=True)
    return [StepError(step, *values) for step, values in enumerate(curves, start=1)]


def _pairs(reference: Path, quantized: Path) -> Iterator[tuple[Trajectory, Trajectory]]:
    for path in sorted(reference.glob(f"[0-9]*{SUFFIX}")):
        name = path.name.removesuffix(SUFFIX) + ".png"
        fp, other = (read_trajectory(folder / name, read_key(folder / name)) for folder in (reference, quantized))
        if fp is not None and other is not None and _compare(fp, other):
            yield fp, other


def _compare(fp: Trajectory, other: Trajectory) -> bool:
    """Whether both took the same steps to latents of the same size, all of them finite."""
    return (
        torch.equal(fp.timesteps, other.timesteps)
        and fp.latents.shape == other.latents.shape
        and bool(fp.latents.isfinite().all() and other.latents.isfinite().all())
    )


def _mean(curves: list[torch.Tensor]) -> list[float]:
    return torch.stack(curves).mean(0).tolist()
