"""Files written tensor by tensor are what safetensors reads, whole or not there."""

import weakref
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from dmquant.errors import UserError
from dmquant.exchange import tensor_file
from dmquant.exchange.tensor_file import DTYPES, Entry, stored, write
from dmquant.host import weight_file

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8),
    st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES, st.integers(0, 2**31)),
    max_size=6,
)


def made(dtype, shape, seed):
    size = torch.Size(shape).numel() * dtype.itemsize
    octets = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return octets.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def octets(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


@given(TENSORS)
def test_safetensors_reads_what_was_written(tmp_path_factory, given):
    path = tmp_path_factory.mktemp("files") / "weights.safetensors"
    tensors = {name: made(*parts) for name, parts in given.items() if name != "__metadata__"}
    told = []
    write(path, [stored(*item) for item in tensors.items()], {"about": "ä"}, lambda *args: told.append(args))
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert octets(read[name]) == octets(tensor)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "about": "ä"}
    for tensor in weight_file.header(path).values():
        assert tensor.begin % DTYPES[tensor.dtype].itemsize == 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert not tensors or told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in tensors.values())


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive = []

    def make():
        assert not any(one() is not None for one in alive[:-1])
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    write(tmp_path / "w.safetensors", [Entry(str(i), torch.float32, (1000,), make) for i in range(5)], {})
    assert len(alive) == 5


def test_what_stops_half_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"before")

    def broken():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, [stored("a", torch.zeros(3)), Entry("b", torch.uint8, (4,), broken)], {})
    with pytest.raises(ValueError, match=r"b is torch\.float32"):
        write(path, [stored("a", torch.zeros(3)), Entry("b", torch.uint8, (4,), lambda: torch.zeros(4))], {})
    with pytest.raises(ValueError, match="same name"):
        write(path, [stored("a", torch.zeros(3)), stored("a", torch.zeros(3))], {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    assert path.read_bytes() == b"before"


def test_a_disk_without_room_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file.shutil, "disk_usage", lambda place: namedtuple("Usage", "free")(100))
    with pytest.raises(UserError, match="takes 400 B, and its disk has 100 B left: make room"):
        write(tmp_path / "new" / "w.safetensors", [Entry("a", torch.float32, (100,), pytest.fail)], {})
    assert not list(tmp_path.iterdir())
