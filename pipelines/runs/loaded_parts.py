"""The parts of a pipeline that models of several recipes have in common, in memory once for all of them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dmquant.host.files import fingerprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCHEDULER = "scheduler"  # has a state of its own, and is nothing to load


class LoadedParts:
    """Parts beside the backbones, as the first model that was loaded had them; without `keeps` none are kept."""

    def __init__(self, keeps: bool = True):
        self.keeps = keeps
        self.kept: dict[str, Any] = {}
        self._backbones, self._key = (), ""

    def of(self, backbones: Sequence[str], sha256: Mapping[str, str]) -> dict[str, Any]:
        """The parts kept, if they are from files like those of the model about to be loaded; else none are any more."""
        places = tuple(f"{name}/" for name in backbones)
        key = fingerprint(files={name: digest for name, digest in sha256.items() if not name.startswith(places)})
        if key != self._key:
            self.clear()
        self._backbones, self._key = tuple(backbones), key
        return self.kept

    def keep(self, pipeline: "DiffusionPipeline") -> None:
        """Keep the parts of the model that was loaded, but those that are quantized: full precision takes them too."""
        if self.keeps:
            others = {name: part for name, part in pipeline.components.items() if part is not None}
            self.kept = {
                name: part
                for name, part in others.items()
                if name not in (*self._backbones, SCHEDULER) and not getattr(part, "is_quantized", False)
            }

    def clear(self) -> None:
        """Drop what is kept."""
        self.kept, self._key = {}, ""
