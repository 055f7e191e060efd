"""The images that metrics score."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dmquant.errors import UserError
from dmquant.evaluation.images import ImagePairs, generated_images
from dmquant.evaluation.networks import Networks
from dmquant.evaluation.png import read_prompt
from dmquant.evaluation.progress import Progress, silent


@dataclass
class ScoredImages:
    """The images scored, the full-precision ones and real ones, all as folders; and the networks to look through.

    `prompts` has one entry an image of `images`, in the order of the file names; without it the PNGs are asked.
    """

    images: Path
    reference: Path
    real: Path | None = None
    networks: Networks = field(default_factory=Networks)
    progress: Progress = field(default=silent)
    prompts: Sequence[str] | None = None

    @cached_property
    def pairs(self) -> ImagePairs:
        """The images and the full-precision ones, matched by name; raises UserError where one lacks its twin."""
        return ImagePairs.open(self.reference, self.images)

    @cached_property
    def captions(self) -> Sequence[str]:
        """The prompt of every image; raises UserError for an image that carries none and prompts that do not match."""
        paths = generated_images(self.images)
        if self.prompts is None:
            return [read_prompt(path) or _without_prompt(path) for path in paths]
        if len(self.prompts) != len(paths):
            raise UserError(f"{len(self.prompts)} prompts for the {len(paths)} images in {self.images}")
        return self.prompts


def _without_prompt(path: Path) -> str:
    raise UserError(f"{path} does not say which prompt it was made from: give the prompts with --prompts")
