"""Pipeline folders for other loaders: whole or not at all, by diffusers alone, nothing of the user's lost."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline

from dmquant.errors import UserError
from dmquant.exchange import folder, tensor_file
from dmquant.host import checksums
from dmquant.pipelines.models.opening import open_source
from dmquant.recipe import Recipe

CODE = "pipe = load('here')"


@pytest.fixture(scope="module")
def source(saved):
    folder = saved(Recipe(name="blocks", weights="nvfp4"))
    checksums.write(folder)
    return open_source(folder)


def nothing(done, total):
    pass


def in_full_precision(source, **changed):
    """The model as a folder of plain tensors."""
    layers = {
        name: tensor_file.Entry(f"{name}.weight", torch.float32, layer.weight_shape, lambda n=name: weight(source, n))
        for name, layer in source.layers.items()
    }
    biases = [f"{name}.bias" for name, layer in source.layers.items() if layer.bias is not None]
    rest = [
        tensor_file.Entry(name, tensor_file.DTYPES[header.dtype], header.shape, lambda n=name: source.tensor(n))
        for name, header in ((name, source.header(name)) for name in [*source.rest, *biases])
    ]
    given = {"entries": [*layers.values(), *rest], "quantization": None, "usage": CODE}
    return folder.Folder(**{"format": "plain", "title": "any loader", **given, **changed})


def weight(source, name):
    return source.layer(name).dequantize(torch.float32)


@pytest.mark.parametrize("shard", [1 << 40, 20_000])
def test_diffusers_loads_what_was_written(source, tmp_path, monkeypatch, shard):
    monkeypatch.setattr(folder, "SHARD", shard)
    told = []
    folder.write(source, tmp_path / "out", in_full_precision(source), lambda *seen: told.append(seen))
    files = list((tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert (len(files) > 1) == (shard < 1 << 40)
    state = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.state_dict()
    for name in source.layers:
        assert torch.equal(state[f"{name}.weight"], weight(source, name))
    assert told[-1][0] == told[-1][1] == max(told)[0]
    assert sorted(told) == told


def test_other_parts_are_copied_and_what_is_ours_is_not(source, tmp_path):
    folder.write(source, tmp_path / "out", in_full_precision(source, quantization={"quant_method": "x"}), nothing)
    for path in source.folder.rglob("*"):
        copy = tmp_path / "out" / path.relative_to(source.folder)
        if path.is_file() and source.component not in path.parts and path.name not in (checksums.NAME, folder.CARD):
            assert copy.read_bytes() == path.read_bytes()
            assert not copy.samefile(path)
    assert not (tmp_path / "out" / checksums.NAME).exists()
    assert CODE in (tmp_path / "out" / folder.CARD).read_text()
    config = json.loads((tmp_path / "out" / source.component / folder.CONFIG).read_text())
    assert config["quantization_config"] == {"quant_method": "x"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_later_export_replaces_its_own_files_and_keeps_the_users(source, tmp_path):
    out = tmp_path / "out"
    folder.write(source, out, in_full_precision(source), nothing)
    (out / "notes.txt").write_text("mine")
    (out / "model_index.json").write_text("changed")
    extra = tensor_file.stored("new", torch.ones(3))
    again = in_full_precision(source)
    folder.write(source, out, in_full_precision(source, entries=[*again.entries, extra]), nothing)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model_index.json.replaced").read_text() == "changed"
    assert (out / "model_index.json").read_bytes() == (source.folder / "model_index.json").read_bytes()
    assert [path.name for path in out.rglob("*.replaced*")] == ["model_index.json.replaced"]


def test_where_it_fails_nothing_is_left_and_the_old_one_stays(source, tmp_path):
    out = tmp_path / "out"
    folder.write(source, out, in_full_precision(source), nothing)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def fails():
        raise UserError("no such layer")

    broken = tensor_file.Entry("broken", torch.float32, (2,), fails)
    with pytest.raises(UserError, match="no such layer"):
        folder.write(source, out, in_full_precision(source, entries=[broken]), nothing)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_disk_without_room_is_named_before_anything_is_made(source, tmp_path):
    huge = tensor_file.Entry("huge", torch.float32, (1 << 50,), lambda: pytest.fail("made"))
    with pytest.raises(UserError, match=r"has .* left: make room"):
        folder.write(source, tmp_path / "out", in_full_precision(source, entries=[huge]), nothing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_model_and_export_cannot_lie_in_one_another(source, place):
    with pytest.raises(UserError, match="lie in one another"):
        folder.write(source, source.folder / place, in_full_precision(source), nothing)


def test_a_file_is_not_replaced_by_a_folder(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        folder.write(source, tmp_path / "out", in_full_precision(source), nothing)
    assert (tmp_path / "out").read_text() == "mine"
