"""Outputs of blocks: the same bits from memory and from disk, and memory given back."""

import pytest
import torch

from dmquant.calib.blocks.outputs import Budget, Outputs, nbytes
from dmquant.calib.data.tree import flatten
from dmquant.errors import UserError

CPU, COUNT, ROWS = torch.device("cpu"), 7, 2
PLENTY = 1 << 30


def output_of(dtype, samples, seed):
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape, dtype=dtype):
        return torch.randn(samples * ROWS, *shape, generator=generator).to(dtype)

    return (leaf(3, 4), {"skips": [leaf(5), leaf()], "none": None}, leaf(2, dtype=torch.float32).long())


def one_of(output, samples):
    return (
        output[0][: len(output[0]) // samples],
        {"skips": [leaf[: len(leaf) // samples] for leaf in output[1]["skips"]], "none": None},
        output[2][: len(output[2]) // samples],
    )


def filled(dtype, budget, batches=((4, 0, 6), (1, 5), (3, 2))):
    first = output_of(dtype, len(batches[0]), 0)
    outputs = Outputs(range(COUNT), one_of(first, len(batches[0])), budget)
    for seed, batch in enumerate(batches):
        outputs.write(batch, output_of(dtype, len(batch), seed))
    return outputs


def bits(output):
    skeleton, leaves = flatten(output)
    return skeleton, [(leaf.dtype, leaf.shape, leaf.contiguous().view(-1).view(torch.uint8)) for _, leaf in leaves]


def is_same(one, other):
    (skeleton, leaves), (others_skeleton, others) = bits(one), bits(other)
    return skeleton == others_skeleton and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(leaves, others, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spilled_outputs_are_those_in_memory_bit_for_bit(dtype, tmp_path):
    memory = filled(dtype, Budget(PLENTY, tmp_path / "unused"))
    disk = filled(dtype, Budget(0, tmp_path / "spill"))
    some = nbytes(one_of(output_of(dtype, 1, 0), 1)) * COUNT // 2
    mixed = filled(dtype, Budget(some, tmp_path / "spill"))
    assert not (tmp_path / "unused").exists()
    for batch in ([4, 0, 6], [2], [6, 6, 1, 3], range(COUNT)):
        expected = memory.read(batch, CPU)
        assert is_same(disk.read(batch, CPU), expected)
        assert is_same(mixed.read(batch, CPU), expected)


@pytest.mark.parametrize("total", [0, PLENTY])
def test_a_batch_reads_as_it_was_written_in_any_order(total, tmp_path):
    outputs = filled(torch.float32, Budget(total, tmp_path))
    first = output_of(torch.float32, 3, 0)
    assert is_same(outputs.read([4, 0, 6], CPU), first)
    reordered = outputs.read([6, 4], CPU)[0]
    assert torch.equal(reordered, torch.cat([first[0][2 * ROWS :], first[0][:ROWS]]))


@pytest.mark.parametrize("total", [0, PLENTY])
def test_nan_payloads_and_signed_zeros_survive(total, tmp_path):
    odd = torch.tensor([0x7FC12345, -1, -0x80000000, 0x7F800000], dtype=torch.int32).view(torch.float32)
    outputs = Outputs(range(2), odd.view(1, 4), Budget(total, tmp_path))
    outputs.write([1, 0], torch.stack([odd, odd.flip(0)]))
    assert is_same(outputs.read([0, 1], CPU), torch.stack([odd.flip(0), odd]))


def test_memory_is_accounted_for_and_given_back(tmp_path):
    budget = Budget(PLENTY, tmp_path)
    size = COUNT * nbytes(one_of(output_of(torch.float32, 1, 0), 1))
    first, second = (filled(torch.float32, budget) for _ in range(2))
    assert budget.free == PLENTY - 2 * size
    first.close()
    assert budget.free == PLENTY - size
    second.close()
    assert budget.free == PLENTY


def test_a_budget_is_never_overdrawn(tmp_path):
    size = COUNT * nbytes(one_of(output_of(torch.float32, 1, 0), 1))
    budget = Budget(size + size // 2, tmp_path)
    several = [filled(torch.float32, budget) for _ in range(3)]
    assert 0 <= budget.free < size
    for outputs in several:
        outputs.close()
    assert budget.free == size + size // 2


def test_no_files_are_left_open_or_closed(tmp_path):
    outputs = filled(torch.float32, Budget(0, tmp_path))
    assert list(tmp_path.iterdir()) == []
    outputs.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_never_written_to_disk_is_not_read_as_zeros(tmp_path):
    outputs = Outputs(range(COUNT), torch.zeros(1, 4), Budget(0, tmp_path))
    outputs.write([0], torch.ones(1, 4))
    with pytest.raises(UserError, match="shorter than it was written"):
        outputs.read([5], CPU)


def test_nothing_is_unlinked_while_it_is_open(tmp_path, monkeypatch):
    """Windows refuses that."""

    def refused(path, missing_ok=False):
        raise PermissionError(f"{path} is used by another process")

    monkeypatch.setattr("pathlib.Path.unlink", refused)
    disk = filled(torch.float32, Budget(0, tmp_path / "spill"))
    disk.close()
    assert list((tmp_path / "spill").iterdir()) == []
