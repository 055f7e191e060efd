"""Calibration data on disk: arguments of the backbone's forward, each row stored once, read by memory map."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dmquant.calib.data.index import INDEX, Index
from dmquant.calib.data.tree import may_be_padded, unflatten
from dmquant.errors import UserError


class CalibrationStore:
    """Captured arguments of the backbone's forward, to be replayed in mini-batches of any samples. Read-only.

    `samples` lists the samples by prompt and step; `steps` counts the backbone calls of one pipeline call and
    `timesteps` holds the timestep of each; `rows` is the batch dimension of one sample (2 with guidance, else 1);
    `weights` are the measured importances of the steps or None; `key` stands for everything the data depends on.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        """Open a folder whose shards have just been checked or written; `CalibrationStore.open` checks them."""
        self.steps, self.timesteps, self.rows = index.steps, index.timesteps, index.rows
        self.weights, self.key = index.weights, index.key
        self._folder, self._skeletons = folder, index.skeletons
        self._places = [(shard, stored) for shard in index.shards for stored in shard.samples]
        self.samples = [stored.sample for _, stored in self._places]
        file = functools.cache(lambda name: safe_open(folder / name, framework="pt"))
        # Views of mapped files: they take no memory to keep, and time to make.
        self._tensor = functools.cache(lambda shard, name: file(shard).get_tensor(str(name)))
        self._padded = list(map(may_be_padded, self._skeletons))

    @classmethod
    def open(cls, folder: Path) -> "CalibrationStore":
        """Open the data in `folder`; UserError where it is not all there or a checksum does not match."""
        index = Index.load(folder)
        if index is None:
            raise UserError(
                f"{folder} holds no calibration data, or its {INDEX} is damaged: capture again to make it anew"
            )
        damaged = [shard.name for shard in index.shards if not shard.is_whole(folder)]
        if damaged:
            raise UserError(f"{folder / damaged[0]} is damaged; capture again to replace it alone")
        if index.missing():
            raise UserError(f"the calibration data in {folder} is not finished; capture again to continue it")
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], device: str | torch.device = "cpu") -> tuple[tuple, dict[str, Any]]:
        """Positional and keyword arguments of the backbone's forward for the samples `indices`, in that order.

        The `rows` rows of a sample stay together: [sample 0 unconditional, sample 0 conditional, sample 1 ...].
        Tensors without dimensions become one value a row, so samples of different timesteps mix. What is padded is as
        long as the longest of all samples, whatever the batch: all that a block gives for a sample has one shape.
        Raises UserError for samples that differ in what is passed once for all rows, or in the length of other rows.
        """
        places = [self._places[index] for index in indices]
        shards = [shard.name for shard, _ in places]
        skeletons = {stored.skeleton for _, stored in places}
        if len(skeletons) != 1:
            raise UserError(f"samples {list(indices)} cannot share a batch: the pipeline passed them other arguments")
        leaves = zip(*(stored.leaves for _, stored in places), strict=True)
        [skeleton] = skeletons
        tensors = [self._leaf(shards, names, (skeleton, number)).to(device) for number, names in enumerate(leaves)]
        return (), unflatten(self._skeletons[skeleton], tensors, len(indices))

    @functools.cached_property
    def _longest(self) -> dict[tuple[int, int], int]:
        """Entries of the longest row of each tensor that may be padded, by its skeleton and its number there."""
        longest: dict[tuple[int, int], int] = {}
        for shard, stored in self._places:
            for number in self._padded[stored.skeleton]:
                key = stored.skeleton, number
                lengths = [len(self._tensor(shard.name, row)) for row in stored.leaves[number]]
                longest[key] = max(longest.get(key, 0), *lengths)
        return longest

    def _leaf(self, shards: list[str], names: Sequence[list[int] | int], leaf: tuple[int, int]) -> Tensor:
        places = list(zip(shards, names, strict=True))
        if isinstance(names[0], list):
            tensors = [self._tensor(shard, row) for shard, rows in places for row in rows]
            if leaf[1] in self._padded[leaf[0]]:
                tensors = [_lengthened(tensor, self._longest[leaf]) for tensor in tensors]
            if len({tensor.shape for tensor in tensors}) > 1:
                shapes = " and ".join(sorted({"x".join(map(str, tensor.shape)) for tensor in tensors}))
                raise UserError(
                    f"these samples cannot share a batch: the pipeline passed tensors of {shapes} for them, such as "
                    "those of prompts of different lengths without a mask; calibrate on prompts of equal length"
                )
            return torch.stack(tensors)
        first, *others = [self._tensor(*place) for place in dict.fromkeys(places)]
        if not all(torch.equal(first, other) for other in others):
            raise UserError("these samples cannot share a batch: a tensor that all rows share differs between them")
        return first.clone()


def _lengthened(row: Tensor, length: int) -> Tensor:
    """A row (entries, ...) with zeros behind its entries, (length, ...)."""
    return torch.cat([row, row.new_zeros(length - len(row), *row.shape[1:])]) if len(row) < length else row


def timesteps_of(store: CalibrationStore, indices: Sequence[int]) -> Tensor:
    """The timesteps of the samples `indices`, (samples,), float32, or int64 where all are whole numbers."""
    found = [store.timesteps[store.samples[index].step] for index in indices]
    return torch.tensor(found, dtype=torch.float32 if any(isinstance(one, float) for one in found) else torch.int64)
