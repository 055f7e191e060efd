"""Outputs of a block for every sample, in memory while the budget lasts and in files beyond it, bit for bit alike."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmquant.calib.data.tree import flatten, map_floats, unflatten
from dmquant.errors import UserError


class Budget:
    """Bytes that may be held in memory; `spill` is the folder for what does not fit."""

    def __init__(self, total: int, spill: Path):
        self.free, self.spill = total, spill

    def take(self, nbytes: int) -> bool:
        """Reserve bytes if that many are free."""
        if fits := nbytes <= self.free:
            self.free -= nbytes
        return fits


class _Memory:
    """Records of equal size in one tensor."""

    def __init__(self, count: int, record: Tensor, budget: Budget):
        self._records, self._budget = record.new_empty((count, *record.shape)), budget

    def read(self, indices: Sequence[int]) -> Tensor:
        return self._records[list(indices)]

    def write(self, indices: Sequence[int], records: Tensor) -> None:
        self._records[list(indices)] = records

    def close(self) -> None:
        self._budget.free += self._records.nbytes
        del self._records


class _File:
    """Records of equal size in a file that is gone when it is closed, or the process dies.

    Plain reads and writes: a memory map would count as resident memory.
    """

    def __init__(self, count: int, record: Tensor, budget: Budget):
        self._shape, self._dtype, self._bytes = record.shape, record.dtype, record.nbytes
        budget.spill.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(buffering=0, dir=budget.spill)  # noqa: SIM115 (closed by `close`)

    def read(self, indices: Sequence[int]) -> Tensor:
        records = torch.empty((len(indices), *self._shape), dtype=self._dtype)
        for record, index in zip(_bytes_of(records), indices, strict=True):
            self._file.seek(index * self._bytes)
            if self._file.readinto(record) != self._bytes:
                raise UserError("a file of spilled activations is shorter than it was written")
        return records

    def write(self, indices: Sequence[int], records: Tensor) -> None:
        for record, index in zip(_bytes_of(records.contiguous()), indices, strict=True):
            self._file.seek(index * self._bytes)
            self._file.write(record)

    def close(self) -> None:
        self._file.close()


def _bytes_of(records: Tensor) -> list[memoryview]:
    return [memoryview(record.reshape(-1).view(torch.uint8).numpy()) for record in records]


class Outputs:
    """The output of one block (a tensor or nested tensors) for each of some samples, on the CPU."""

    def __init__(self, samples: Sequence[int], one: Any, budget: Budget):
        """`samples` are indices; `one` is the output for one: its batch dimension holds the rows of a sample."""
        self._skeleton, leaves = flatten(one)
        self._places, count = {sample: place for place, sample in enumerate(samples)}, len(samples)
        self._leaves = []
        for _, leaf in leaves:
            kind = _Memory if budget.take(count * leaf.nbytes) else _File
            self._leaves.append(kind(count, leaf.detach().cpu(), budget))

    def write(self, indices: Sequence[int], output: Any) -> None:
        """Keep the output of a batch of samples; its leaves hold their rows one sample after another."""
        places = [self._places[index] for index in indices]
        for (_, leaf), records in zip(flatten(output)[1], self._leaves, strict=True):
            records.write(places, leaf.detach().cpu().unflatten(0, (len(indices), -1)))

    def read(self, indices: Sequence[int], device: torch.device) -> Any:
        """The output of a batch of samples, as a forward pass over all of them would give it."""
        places = [self._places[index] for index in indices]
        batch = [records.read(places).flatten(0, 1).to(device) for records in self._leaves]
        return unflatten(self._skeleton, batch)

    def close(self) -> None:
        """Give back memory or disk."""
        for records in self._leaves:
            records.close()


def nbytes(one: Any) -> int:
    """Bytes of the tensors of an output."""
    return sum(leaf.nbytes for _, leaf in flatten(one)[1])


def stand_in(one: Any, samples: int, device: torch.device, is_overwritten: bool = False) -> Any:
    """A placeholder for an output that nothing reads any more: zeros of its shape and dtype.

    They take no memory unless the output is written into. `one` is the output for one sample, with tensors (rows, ...);
    the placeholder's are (samples * rows, ...).
    """

    def shaped(leaf: Tensor) -> Tensor:
        zeros = torch.zeros((), dtype=leaf.dtype, device=device).expand(samples * len(leaf), *leaf.shape[1:])
        return zeros.contiguous() if is_overwritten else zeros

    return map_floats(shaped, one)


def first_sample(output: Any, samples: int) -> Any:
    """The part of a batch's output that belongs to the first of its samples."""
    return map_floats(lambda leaf: leaf[: len(leaf) // samples], output)


def mixed(quantized: Any, full: Any, share: float, generator: torch.Generator) -> Any:
    """QDrop (Wei et al., arXiv 2203.05740), eq. 8: each element is the full-precision one with probability `share`.

    `quantized` and `full` are outputs that nest tensors alike, in pairs of the same shape; so does the result.
    """
    others = iter([leaf for _, leaf in flatten(full)[1] if leaf.is_floating_point()])

    def mix(leaf: Tensor) -> Tensor:
        drawn = torch.rand(leaf.shape, generator=generator, dtype=torch.float32).to(leaf.device)
        return torch.where(drawn < share, next(others), leaf)

    return map_floats(mix, quantized)
