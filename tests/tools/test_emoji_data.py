"""The list of captions in emoji_captions.txt: how it is written, and that the embedded models learnt from it."""

import json
import runpy
import sys

import pytest

from dmquant.pipelines.models.registry import embedded_folder, registered_models
from tests.tools.conftest import CAPTIONS, TOOLS


def test_the_tool_lists_the_captions_of_a_package_sorted(package, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emoji_data.py", str(package)])
    runpy.run_path(str(TOOLS / "emoji_data.py"), run_name="__main__")
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 8
    assert listed == sorted(listed)
    assert listed[0] == "black ellipse, symbols, geometric shape"


@pytest.mark.parametrize("model", ["emoji-pixart", "emoji-sd"])
def test_the_listed_captions_are_those_that_the_embedded_models_learnt_from(tools, model):
    """Another caption among 1,911 would have given their tokenizer other pieces, or other scores of them."""
    captions = CAPTIONS.read_text("utf-8").splitlines()
    assert len(captions) == 1911
    shipped = embedded_folder(registered_models()[model].source) / "tokenizer" / "tokenizer.json"
    pieces = dict(json.loads(shipped.read_text("utf-8"))["model"]["vocab"])
    made = tools("emoji_data").make_tokenizer(captions).backend_tokenizer.to_str()
    assert dict(json.loads(made)["model"]["vocab"]) == pytest.approx(pieces, abs=1e-9)
