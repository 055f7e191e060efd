"""The networks that metrics look through: each loaded when first asked for, and kept.

Their modules are imported when first asked for, too: open_clip alone takes seconds.
"""

from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dmquant.evaluation.networks.features import FeatureStore
from dmquant.evaluation.networks.inception import Inception

if TYPE_CHECKING:
    from torch import nn

    from dmquant.evaluation.networks.clip import ClipModel
    from dmquant.evaluation.networks.preference_score import HPSv2

CLIP = "ViT-L-14-336:openai"  # what CMMD is defined with


class Networks:
    """Networks of one command on one device, and the features that they have given.

    `clip` names the CLIP model of CLIP score and CMMD. Features are kept in the folder `features`, if one is given.
    Each network raises UnavailableError where its weights are not at hand. `say` is told of downloads. With
    `one_at_a_time`, for a device that is too small, a network is dropped when another is asked for.
    """

    def __init__(
        self,
        device: str = "cpu",
        clip: str = CLIP,
        features: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        one_at_a_time: bool = False,
    ):
        self.one_at_a_time = one_at_a_time
        self.device, self.clip_name, self.say = device, clip, say
        self.store = FeatureStore(features)
        self.hpsv2 = cache(self._hpsv2)
        self.lpips = cache(self._lpips)

    @cached_property
    def inception(self) -> Inception:
        self._make_room()
        return Inception.load(self.device)

    @cached_property
    def clip(self) -> "ClipModel":
        from dmquant.evaluation.networks.clip import ClipModel

        self._make_room()
        return ClipModel.load(self.clip_name, self.device, self.say)

    def _hpsv2(self, version: str) -> "HPSv2":
        """`version` is 2.0 or 2.1."""
        from dmquant.evaluation.networks.preference_score import HPSv2

        self._make_room()
        return HPSv2.load(version, self.device, self.say)

    def _lpips(self, network: str) -> "nn.Module":
        """`network` is alex or vgg."""
        from dmquant.evaluation.networks.perceptual_distance import load_lpips

        self._make_room()
        return load_lpips(network, self.device)

    def _make_room(self) -> None:
        """Drop all networks, where only one is to be there."""
        if self.one_at_a_time:
            for name in ("inception", "clip"):
                vars(self).pop(name, None)
            self.hpsv2.cache_clear()
            self.lpips.cache_clear()
