"""A draft of a family, against the families that are known."""

import json
import runpy

import pytest

from dmquant.convert import layers_in
from dmquant.diffusers import families as registry
from dmquant.diffusers.families import Family, families
from dmquant.errors import UserError
from dmquant.matching import Matcher
from dmquant.pipelines.models.drafting import draft
from dmquant.pipelines.models.registry import resolve_model
from tests.tiny import TINY

GUIDANCE = {"pixart-sigma": "rows", "sd15": "rows", "sd3": "rows", "flux": "calls", "qwenimage": "calls"}


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    """By model, the family that its draft defines, its own, and its backbone."""

    def build(name):
        folder = tmp_path_factory.mktemp("drafts") / name
        pipeline = TINY[name].build()
        family = families()[TINY[name].family]
        pipeline.save_pretrained(folder)
        file = folder / "my_family.py"
        file.write_text(draft(folder, family.component, type(pipeline).__name__))
        return folder, file, runpy.run_path(str(file))["FAMILY"], family, getattr(pipeline, family.component)

    return build


@pytest.mark.parametrize("name", ["pixart-sigma", "sd3", "flux"])
def test_a_draft_finds_blocks_and_puts_all_other_layers_among_the_kept(drafted, name):
    _, _, found, family, backbone = drafted(name)
    assert isinstance(found, Family)
    assert (found.component, found.backbones) == (family.component, (type(backbone).__name__,))
    assert set(found.blocks(backbone)) == set(family.blocks(backbone))
    assert found.guidance == GUIDANCE[name]
    matcher = Matcher(list(found.keep))
    blocks = tuple(f"{block}." for block in found.blocks(backbone))
    assert all(bool(matcher.matching(layer)) != layer.startswith(blocks) for layer in layers_in(backbone))
    if name == "flux":
        assert found.shared == family.shared


def test_a_file_with_a_family_is_taken_by_its_path(drafted, monkeypatch, tmp_path):
    folder, file, found, family, backbone = drafted("pixart-sigma")
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(UserError, match=r"no file .*mine\.py with a family: `dmquant draft-family MODEL --out"):
        resolve_model(str(folder), str(tmp_path / "mine.py"))
    other = tmp_path / "other.py"
    other.write_text("FAMILY = 1 / 0")
    with pytest.raises(UserError, match="cannot be run: ZeroDivisionError"):
        resolve_model(str(folder), str(other))
    other.write_text("x = 1")
    with pytest.raises(UserError, match="defines no FAMILY"):
        resolve_model(str(folder), str(other))
    with pytest.raises(UserError, match="its name or a backbone of its is that of family pixart"):
        resolve_model(str(folder), str(file))
    own = file.read_text().replace(type(backbone).__name__, "MyOwnTransformer")
    other.write_text(own)
    config = folder / family.component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "MyOwnTransformer"}))
    assert resolve_model(str(folder), str(other)).family == found.name


def test_a_backbone_without_blocks_gets_none(tmp_path, monkeypatch):
    from torch import nn

    monkeypatch.setattr("dmquant.pipelines.models.drafting.skeleton", lambda folder: nn.Linear(2, 2))
    with pytest.raises(UserError, match="has no list of blocks"):
        draft(tmp_path, "transformer", "PixArtSigmaPipeline")
