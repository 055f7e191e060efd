"""The store: content kept once, batches in any order, and damage that is noticed."""

import json
import random
from dataclasses import replace

import pytest
import torch

from dmquant.calib.data.index import INDEX, Index
from dmquant.calib.data.sampling import Sample
from dmquant.calib.data.shard import Captured, Kept, ShardWriter
from dmquant.calib.data.store import CalibrationStore
from dmquant.errors import UserError
from dmquant.host.files import json_sha256

SKELETON = {"dict": {"x": {"tensor": 0}, "table": {"tensor": 1}, "flag": True}}
OTHER = {"dict": {"x": {"tensor": 0}, "table": {"tensor": 1}, "flag": False}}


def write(folder, tables=((1.0, 2.0), (1.0, 2.0)), skeletons=(SKELETON, SKELETON)):
    """Two shards of one prompt and two rows each: x is [prompt, 10 + prompt]."""
    index = Index({"height": 8}, prompts=2, steps=1)
    for prompt, (table, skeleton) in enumerate(zip(tables, skeletons, strict=True)):
        writer = ShardWriter()
        rows = [writer.add(torch.tensor(float(value)))[0] for value in (prompt, 10 + prompt)]
        kept = [Kept(Sample(prompt, 0, prompt == 1), skeleton, [rows, writer.add(torch.tensor(table))[0]])]
        captured = Captured(index.setup, prompt, prompt + 1, [5.0], 2, kept)
        index.add(captured, writer.save(folder, captured))
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
    write(tmp_path / "skeletons", skeletons=(SKELETON, OTHER))
    with pytest.raises(UserError, match="passed them other arguments"):
        CalibrationStore.open(tmp_path / "skeletons").batch([0, 1])


def write_texts(folder, skeleton):
    """Two prompts of one row each: texts of 2 and 3 tokens, with a mask of what is no padding, which only one has."""
    index = Index({}, prompts=2, steps=1)
    for prompt, mask in enumerate(([True, False], [True, True, True])):
        writer = ShardWriter()
        leaves = [[writer.add(torch.full((len(mask), 2), 1.0 + prompt))[0]], [writer.add(torch.tensor(mask))[0]]]
        captured = Captured(
            index.setup, prompt, prompt + 1, [5.0], 1, [Kept(Sample(prompt, 0, False), skeleton, leaves)]
        )
        index.add(captured, writer.save(folder, captured))
    index.save(folder)
    return CalibrationStore.open(folder)


def test_what_is_padded_is_as_long_as_the_longest_in_every_batch(tmp_path):
    store = write_texts(tmp_path, {"dict": {"text": {"padded": 0}, "mask": {"mask": 1}, "sizes": {"rows": [1]}}})
    both, short, long = (store.batch(indices)[1] for indices in ([1, 0], [0], [1]))
    assert both["text"][..., 0].tolist() == [[2, 2, 2], [1, 1, 0]]
    assert both["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert both["sizes"] == [1, 1]
    assert short["mask"].tolist() == [[True, False, False]]
    assert torch.equal(short["text"], both["text"][1:])
    assert long["mask"] is None


def test_rows_of_different_lengths_that_no_mask_tells_apart_are_refused(tmp_path):
    store = write_texts(tmp_path, {"dict": {"text": {"tensor": 0}, "mask": {"tensor": 1}}})
    assert store.batch([0])[1]["text"].shape == (1, 2, 2)
    with pytest.raises(UserError, match=r"tensors of 2x2 and 3x2 for them.* calibrate on prompts of equal length"):
        store.batch([0, 1])


def test_the_same_content_is_one_tensor_and_other_types_or_shapes_are_not(tmp_path):
    writer = ShardWriter()
    zeros = torch.zeros(4)
    same = [zeros, torch.zeros(8)[::2], zeros.clone()]
    other = [zeros.int(), zeros.bfloat16(), torch.zeros(2, 2), torch.zeros(()), torch.zeros(4, dtype=torch.bool)]
    assert {writer.add(tensor)[0] for tensor in same} == {0}
    assert [writer.add(tensor) for tensor in other] == [(number, True) for number in range(1, 6)]
    zeros.add_(1)  # the pipeline goes on working with its tensor
    index = Index({}, prompts=1, steps=1)
    kept = Kept(Sample(0, 0, False), {"list": [{"tensor": number} for number in range(6)]}, list(range(6)))
    captured = Captured(index.setup, 0, 1, [0.0], 1, [kept])
    index.add(captured, writer.save(tmp_path, captured))
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
    "text", [None, "{", "[]", "null", '{"version": 1}', '{"version": 2}', '{"version": 99}', "[" * 10**5]
)
def test_an_index_that_cannot_be_read(tmp_path, text):
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    assert Index.load(tmp_path) is None
    with pytest.raises(UserError, match="holds no calibration data, or its index"):
        CalibrationStore.open(tmp_path)


def test_an_index_of_a_later_version_is_refused(tmp_path):
    content = {"version": 99, "seen": "later"}
    (tmp_path / INDEX).write_text(json.dumps(content | {"sha256": json_sha256(content)}))
    with pytest.raises(UserError, match="has version 99, this dmquant reads 2: update it"):
        CalibrationStore.open(tmp_path)


def test_an_index_of_the_version_before_is_read(tmp_path):
    index = write(tmp_path)
    content = json.loads((tmp_path / INDEX).read_text()) | {"version": 1}
    del content["sha256"]
    (tmp_path / INDEX).write_text(json.dumps(content))
    assert Index.load(tmp_path) == index


def test_a_changed_byte_in_the_index_is_noticed_and_the_shards_tell_it_again(tmp_path):
    index, draw = write(tmp_path), random.Random(0)
    text = (tmp_path / INDEX).read_bytes()
    for position in draw.sample(range(len(text)), 60):
        damaged = bytearray(text)
        damaged[position] ^= 1 << draw.randrange(7)
        (tmp_path / INDEX).write_bytes(damaged)
        assert Index.load(tmp_path) in (None, index), position  # equal where an escape became another
    assert Index.of_shards(tmp_path) == index


def test_shards_that_overlap_or_differ_in_their_settings_are_listed_once(tmp_path):
    index = write(tmp_path)
    whole = Captured(index.setup, 0, 2, [5.0], 2, [])
    other = Captured(replace(index.setup, steps=2), 2, 3, [5.0], 2, [])
    for captured in (whole, other):
        ShardWriter().save(tmp_path, captured)
    assert Index.of_shards(tmp_path) == index


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
    assert json.loads((tmp_path / INDEX).read_text())["version"] == 2
