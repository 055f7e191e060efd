"""`--layout torchao`: the folder that `dmquant export` makes, by the command that quantizes."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dmquant.errors import UsageError
from dmquant.pipelines.commands import exporting, layouts
from dmquant.pipelines.commands.app import app
from dmquant.pipelines.runs.defaults import for_layout
from dmquant.pipelines.runs.settings import resolve
from dmquant.recipe import Recipe

PLAIN = (
    Recipe.load("for-torchao")
    .in_formats(None, "none")
    .with_settings(name="plain", scale="absmax", rounding={"method": "nearest"})
)


@pytest.fixture
def given(quick, tmp_path):
    """Typed options of a recipe without data that torchao's kernels run."""
    PLAIN.save(tmp_path / "plain.yaml")
    options = dataclasses.asdict(quick(recipe=str(tmp_path / "plain.yaml")))
    listed = {name.replace("_", "-"): value for name, value in options.items() if name in ("recipe", "steps", "dtype")}
    return [options["model"], *(word for name, value in listed.items() for word in (f"--{name}", str(value)))]


def files(folder: Path) -> dict[str, bytes]:
    parts = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("README.md", "pairs.png")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in parts if "export" not in path.name}


def test_quantize_writes_it_alone_and_run_beside_its_model(given, quick, tmp_path):
    out = tmp_path / "for-anyone"
    made = CliRunner().invoke(app, ["quantize", *given, "--layout", "torchao", "--out", str(out)])
    assert made.exit_code == 0, made.output
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert [path.name for path in tmp_path.iterdir() if "for-anyone" in path.name] == ["for-anyone"]
    prompts = ["--prompts", quick().prompts, "--metrics", "psnr"]
    ran = CliRunner().invoke(app, ["run", *given, *prompts, "--layout", "torchao", "--out", str(tmp_path / "run")])
    assert ran.exit_code == 0, ran.output
    assert files(tmp_path / "run" / "model-torchao") == files(out)
    exporting.export(tmp_path / "run" / "model", "torchao", tmp_path / "exported", False)
    assert files(tmp_path / "exported") == files(out)
    assert "PSNR" in (tmp_path / "run" / "model-torchao" / "README.md").read_text()
    again = CliRunner().invoke(app, ["quantize", *given, "--layout", "torchao", "--out", str(out)])
    assert again.exit_code == 1
    assert "is there already" in again.output


def test_a_text_encoder_that_needs_dmquant_is_refused_in_it_and_told_of_by_an_export(given, tmp_path, capsys):
    component = ["--component", "vae=w8a16"]
    refused = CliRunner().invoke(
        app, ["quantize", *given, *component, "--layout", "torchao", "--out", str(tmp_path / "t")]
    )
    assert refused.exit_code == 2
    made = CliRunner().invoke(app, ["quantize", *given, *component, "--out", str(tmp_path / "own")])
    assert made.exit_code == 0, made.output
    exporting.export(tmp_path / "own", "torchao", tmp_path / "exported", False)
    assert "vae as dmquant quantized it: whoever loads the folder needs dmquant for that" in capsys.readouterr().out


def test_a_recipe_that_is_not_made_for_it_is_refused_before_any_work(quick):
    with pytest.raises(
        UsageError, match=r"^--layout torchao takes a recipe that is made for it: leave out --recipe rtn"
    ):
        layouts.check("torchao", resolve(quick()))
    layouts.check("dmquant", resolve(quick()))


def test_a_layout_brings_its_recipe_unless_one_is_named():
    nothing = {"recipe": None, "purpose": None, "a": None}
    assert for_layout("torchao", nothing) == nothing | {"purpose": "torchao", "a": "none"}
    assert for_layout("torchao", nothing | {"a": "nvfp4"})["a"] == "nvfp4"
    assert for_layout("torchao", nothing | {"recipe": "x.yaml"}) == nothing | {"recipe": "x.yaml"}
    assert for_layout("dmquant", nothing) == nothing
    with pytest.raises(UsageError, match=r"unknown layout 'torch'.*did you mean 'torchao'"):
        for_layout("torch", nothing)
