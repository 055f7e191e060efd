"""The store: content kept once, batches in any order, and damage that is noticed."""

import json

import pytest
import torch

from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.store import INDEX, CalibrationStore, Index, ShardWriter, StoredSample
from dmquant.errors import UserError

SKELETON = {"dict": {"x": {"tensor": 0}, "table": {"tensor": 1}, "flag": True}}


def write(folder, tables=((1.0, 2.0), (1.0, 2.0)), skeletons=(0, 0)):
    """Two shards of one prompt and two rows each: x is [prompt, 10 + prompt]."""
    index = Index({"height": 8}, prompts=2, steps=1, rows=2, timesteps=[5.0])
    index.skeletons = [SKELETON, {"dict": {"x": {"tensor": 0}, "table": {"tensor": 1}, "flag": False}}]
    for prompt, (table, skeleton) in enumerate(zip(tables, skeletons, strict=True)):
        writer = ShardWriter()
        rows = [writer.add(torch.tensor(float(value)))[0] for value in (prompt, 10 + prompt)]
        leaves = [rows, writer.add(torch.tensor(table))[0]]
        samples = [StoredSample(Sample(prompt, 0, prompt == 1), skeleton, leaves)]
        index.shards.append(writer.save(folder, prompt, prompt + 1, samples))
    index.save(folder)
    return index


def test_batches_follow_the_order_asked_for_and_share_what_is_shared(tmp_path):
    written = write(tmp_path)
    store = CalibrationStore.open(tmp_path)
    assert (store.steps, store.rows, store.timesteps, len(store)) == (1, 2, [5.0], 2)
    assert store.samples == [Sample(0, 0, False), Sample(1, 0, True)]
    assert store.key == written.key
    args, kwargs = store.batch([1, 0, 1])
    assert args == ()
    assert kwargs["x"].tolist() == [1, 11, 0, 10, 1, 11]
    assert kwargs["table"].tolist() == [1, 2]
    assert kwargs["flag"] is True


def test_what_a_batch_returns_may_be_changed(tmp_path):
    write(tmp_path)
    store = CalibrationStore.open(tmp_path)
    for tensor in (store.batch([0])[1]["x"], store.batch([0])[1]["table"]):
        tensor.add_(100)
    assert store.batch([0])[1]["x"].tolist() == [0, 10]
    assert store.batch([0])[1]["table"].tolist() == [1, 2]


def test_samples_that_cannot_share_a_batch(tmp_path):
    write(tmp_path / "tables", tables=((1.0, 2.0), (1.0, 3.0)))
    store = CalibrationStore.open(tmp_path / "tables")
    assert store.batch([1])[1]["table"].tolist() == [1, 3]
    with pytest.raises(UserError, match="all rows share differs"):
        store.batch([0, 1])
    write(tmp_path / "skeletons", skeletons=(0, 1))
    with pytest.raises(UserError, match="passed them other arguments"):
        CalibrationStore.open(tmp_path / "skeletons").batch([0, 1])


def test_the_same_content_is_one_tensor_and_other_types_or_shapes_are_not(tmp_path):
    writer = ShardWriter()
    zeros = torch.zeros(4)
    same = [zeros, torch.zeros(8)[::2], zeros.clone()]
    other = [zeros.int(), zeros.bfloat16(), torch.zeros(2, 2), torch.zeros(()), torch.zeros(4, dtype=torch.bool)]
    assert {writer.add(tensor)[0] for tensor in same} == {0}
    assert [writer.add(tensor) for tensor in other] == [(number, True) for number in range(1, 6)]
    zeros.add_(1)  # the pipeline goes on working with its tensor
    shard = writer.save(tmp_path, 0, 1, [StoredSample(Sample(0, 0, False), 0, list(range(6)))])
    index = Index({}, 1, 1, 1, [0.0], None, [{"list": [{"tensor": number} for number in range(6)]}], [shard])
    stored = CalibrationStore(tmp_path, index).batch([0])[1]
    for written, read in zip([torch.zeros(4), *other], stored, strict=True):
        assert (written.dtype, written.shape) == (read.dtype, read.shape)
        assert torch.equal(written, read)


def test_a_flipped_byte_is_noticed(tmp_path):
    shard = tmp_path / write(tmp_path).shards[1].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        CalibrationStore.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "holds no calibration data"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 99}', "has version 99, this dmquant reads 1"),
    ],
)
def test_an_index_that_cannot_be_read(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=complaint):
        CalibrationStore.open(tmp_path)


def test_an_unfinished_store(tmp_path):
    index = write(tmp_path)
    del index.shards[1]
    index.save(tmp_path)
    assert index.missing() == [1]
    with pytest.raises(UserError, match="not finished"):
        CalibrationStore.open(tmp_path)


def test_the_key_stands_for_what_it_was_made_for_whatever_the_order():
    assert Index({"a": 1, "b": 2}, 2, 1).key == Index({"b": 2, "a": 1}, 9, 1).key != Index({"a": 1, "b": 3}, 2, 1).key


def test_the_index_reads_back_as_it_was_written(tmp_path):
    index = write(tmp_path)
    assert Index.load(tmp_path) == index
    assert json.loads((tmp_path / INDEX).read_text())["version"] == 1
