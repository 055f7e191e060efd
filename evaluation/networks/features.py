"""Features of images and prompts: what a network makes of each, looked at once and kept.

A row belongs to the SHA-256 of the file's bytes (or of the prompt), the network's weights and its preparation: a
renamed or copied image is known, a rewritten one is not. Batches are cut from what is missing in the order of those
hashes and finished in that order. So neither the order of the files nor a stop in between changes which images share
a batch, and every row comes out bit for bit the same; nor does the number of processes, at equal threads in each.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dmquant.evaluation.images import image_sha256
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.read_ahead import READERS, read_ahead
from dmquant.evaluation.result import Backbone
from dmquant.host import processes
from dmquant.host.sealed import load_sealed, save_sealed

SAVE_EVERY = 30.0  # seconds of work that a killed command loses at most
TEXT = "text"
FEATURES = "features"

Item = TypeVar("Item")


class ImageNetwork(Protocol):
    """A network that turns prepared images into features.

    `preparation` is a short name of what `prepare` does; it goes into file names, with the hash of the weights.
    """

    backbone: Backbone
    preparation: str
    batch_size: int

    def prepare(self, path: Path) -> Tensor:
        """Load an image as the network takes it, on the CPU, of one shape for all images; called from several threads.

        Raises UserError for a file that cannot be read as an image.
        """

    def __call__(self, batch: Tensor) -> Tensor:
        """Features [N, D], float32 on the CPU, of N prepared images."""


class FeatureStore:
    """Features of images and prompts by networks, in memory and, with a `folder`, in files there.

    When accelerate or torchrun started several processes, all of them call together, with the same arguments: each
    computes every n-th batch, and all get every row.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._tables: dict[str, _Table] = {}

    def images(
        self, network: ImageNetwork, paths: Sequence[Path], progress: Progress = silent, what: str = FEATURES
    ) -> Tensor:
        """Features [N, D], float32 on the CPU, of the image files `paths`, in their order.

        Raises UserError for a file that cannot be read as an image.
        """
        with ThreadPoolExecutor(READERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def compute(batches: Iterable[list[Path]]) -> Iterator[Tensor]:
                for images in read_ahead(batches, network.prepare, pool):
                    yield network(torch.stack(images))

            files = list(zip(pool.map(image_sha256, paths), paths, strict=True))
            return self._features(network, network.preparation, files, compute, progress, what)

    def texts(
        self,
        network: ImageNetwork,
        texts: Sequence[str],
        encode: Callable[[list[str]], Tensor],
        progress: Progress = silent,
        what: str = "text features",
    ) -> Tensor:
        """Features [N, D] of `texts`, float32 on the CPU, in their order.

        `encode` makes them of a batch of texts; it belongs to `network` and its weights.
        """
        prompts = [(hashlib.sha256(text.encode()).hexdigest(), text) for text in texts]
        return self._features(network, TEXT, prompts, lambda batches: map(encode, batches), progress, what)

    def _features(
        self,
        network: ImageNetwork,
        preparation: str,
        items: list[tuple[str, Item]],
        compute: Callable[[Iterable[list[Item]]], Iterator[Tensor]],
        progress: Progress,
        what: str,
    ) -> Tensor:
        table = self._table(network, preparation)
        missing = {key: item for key, item in sorted(items, key=lambda pair: pair[0]) if key not in table.rows}
        keys = list(missing)
        batches = [keys[start : start + network.batch_size] for start in range(0, len(keys), network.batch_size)]
        ours = processes.current()
        features = compute([missing[key] for key in batch] for batch in ours.share(batches))
        done = len(items) - len(keys)
        for start in range(0, len(batches), ours.count):
            round_ = batches[start : start + ours.count]
            for batch, rows in zip(round_, ours.together(lambda: next(features, None)), strict=False):
                table.add(batch, rows)
                done += len(batch)
                progress(what, done, len(items))
            if ours.is_main:
                table.save(every=SAVE_EVERY)
        if batches:
            if ours.is_main:
                table.save()
            ours.wait()  # whoever opens these files next finds all of them
        return torch.stack([table.rows[key] for key, _ in items])

    def _table(self, network: ImageNetwork, preparation: str) -> "_Table":
        name = f"{network.backbone.sha256[:12]}-{preparation}"
        if name not in self._tables:
            self._tables[name] = _Table(None if self.folder is None else self.folder / name)
        return self._tables[name]


class _Table:
    """Rows of one network by digest. With a folder they are kept there, in files that are written once and whole."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.rows: dict[str, Tensor] = {}
        self._unsaved: list[str] = []
        self._saved_at = time.monotonic()
        for path in sorted(folder.glob("*.safetensors")) if folder else ():
            self.rows |= _read(path)

    def add(self, keys: list[str], rows: Tensor) -> None:
        self.rows |= zip(keys, rows, strict=True)
        self._unsaved += keys

    def save(self, every: float = 0.0) -> None:
        """Write what is not in a file yet, unless the last time was less than `every` seconds ago."""
        if self.folder is None or not self._unsaved or time.monotonic() - self._saved_at < every:
            return
        rows = torch.stack([self.rows[key] for key in self._unsaved])
        path = self.folder / f"{self._unsaved[0][:16]}.safetensors"
        save_sealed(path, {FEATURES: rows}, self._unsaved)
        self._unsaved, self._saved_at = [], time.monotonic()


def _read(path: Path) -> dict[str, Tensor]:
    """The rows in a file by digest; none when it is damaged, so that they are computed again."""
    tensors, digests = load_sealed(path) or ({FEATURES: ()}, ())
    return dict(zip(digests, tensors[FEATURES], strict=True))
