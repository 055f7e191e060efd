"""How near the images of a choice are to those of full precision, on the prompts that costs are measured on."""

from collections.abc import Mapping
from statistics import fmean

from torch import Tensor

from dmquant.evaluation.metrics.psnr import CAP, decibels
from dmquant.evaluation.networks import Networks
from dmquant.pipelines.choice.subject import Subject
from dmquant.pipelines.choice.targets import Target


class Quality:
    """Makes and compares images of choices with a subject's solved weights, inputs quantized as its recipe does."""

    def __init__(self, subject: Subject, networks: Networks):
        self.subject, self.networks = subject, networks
        self._exact: Tensor | None = None

    def of(self, options: Mapping[str, str], target: Target) -> float:
        """The mean of the metric that the target asks, for options by layer; layers without one stay as they are."""
        exact, images = self._reference(), self._images(options)
        if target.psnr is not None:
            return decibels(images, exact).clamp(max=CAP).mean().item()
        device = self.networks.device
        return fmean(self.networks.lpips("alex")(images.to(device), exact.to(device)).tolist())

    def is_enough(self, value: float, target: Target) -> bool:
        """Whether a value is as near as the target asks."""
        return value >= target.psnr if target.psnr is not None else value <= target.lpips

    def _reference(self) -> Tensor:
        if self._exact is None:
            self._exact = self.subject.bench.images()
        return self._exact

    def _images(self, options: Mapping[str, str]) -> Tensor:
        subject = self.subject
        weights = {name: subject.solved.weight(name, option) for name, option in options.items()}
        with subject.bench.weights(weights), subject.bench.inputs(subject.inputs):
            return subject.bench.images()
