"""Every block of Python in README.md and docs/ runs: those of a page one after another, in one namespace.

A block that is not run has its reason in a comment above it: `<!-- not run: ... -->`.
"""

import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from dmquant.pipelines.commands.app import app
from dmquant.pipelines.models.registry import ModelSpec, embedded_folder
from dmquant.recipe import Recipe
from tests.documentation.pages import PAGES, blocks

NAMES = {
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": str(embedded_folder("embedded:emoji-pixart")),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(embedded_folder("embedded:emoji-sd")),
    '"cuda"': '"cpu"',
}
"""What stands in, on a machine without network and GPU, for what pages name."""

NVFP4 = {
    "weights": "nvfp4",
    "granularity": "group:16",
    "store": "e4m3",
    "activations": "nvfp4",
    "activation_granularity": "group:16",
    "activation_scale": "static:1",
    "calibration": {"prompts": 2, "steps_per_prompt": 2},
    "learning": {"batch_size": 2},
}
INT8 = {"weights": "int8", "activations": "none", "granularity": "channel", "store": "fp32"}
IQ4 = {"weights": "iq4_nl", "activations": "none", "granularity": "group:32", "store": "fp16"}
EXPORTED = {
    "docs/exchange/gguf.md": ("gguf", IQ4, "demo-gguf.gguf"),
    "docs/exchange/modelopt.md": ("bfl", NVFP4, "demo-bfl"),
    "docs/exchange/torchao.md": ("torchao", INT8, "demo-torchao"),
}
"""What `dmquant export` left before a page begins: engine, a recipe with less calibration than `--for` has, name."""

NEEDS = {"docs/exchange/gguf.md": "gguf", "docs/exchange/torchao.md": "torchao"}
SLOW = tuple(f"docs/{name}.md" for name in ("activations", "components", "diffusers", "howto", "models", "running"))
"""Pages that calibrate, compile, or load whole pipelines several times: together half a minute and more."""


def python_blocks(page):
    return [block for block in blocks(page) if block.language == "python"]


def runnable():
    pages = [page for page in PAGES if any(not block.not_run for block in python_blocks(page))]
    return [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in pages]


@functools.cache
def demo():
    """The model of a run, for all pages that go on from one; without calibration, which takes longest."""
    folder = Path(tempfile.mkdtemp(prefix="dmquant-tests-"), "model")
    dmquant("quantize", "emoji-pixart", "--recipe", "rtn", "--out", str(folder))
    return folder


def export(engine, recipe, out):
    """A small Stable Diffusion as an engine has it, and the folder in `runs/demo/model` that it is made of."""
    content = {"name": "mine", "engine": engine, **recipe}
    Path("mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    dmquant("quantize", "emoji-sd", "--recipe", "mine.yaml", "--out", "runs/demo/model")
    dmquant("export", "runs/demo/model", "--to", engine, "--out", out)


def dmquant(*words):
    assert not app(list(words), standalone_mode=False)


@pytest.mark.parametrize("page", runnable())
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page in NEEDS and importlib.util.find_spec(NEEDS[page]) is None:
        pytest.skip(f"the page uses {NEEDS[page]}")
    if page in EXPORTED:
        export(*EXPORTED[page])
    elif any("runs/demo/model" in block.text for block in python_blocks(page)):
        shutil.copytree(demo(), "runs/demo/model")
    namespace = {"__name__": "page"}
    for block in python_blocks(page):
        text = block.text
        for name, stand_in in NAMES.items():
            text = text.replace(name, stand_in)
        if not block.not_run:
            # Empty lines before it, so that a traceback has the page's own line numbers.
            exec(compile("\n" * (block.line - 1) + text, PAGES[page], "exec"), namespace)


def test_yaml_has_keys_that_recipes_and_models_have():
    found = [yaml.safe_load(block.text) for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert len(found) >= 3
    for content in found:
        assert set(content) <= set((ModelSpec if "pipeline" in content else Recipe).model_fields)


def test_what_is_not_run_is_little_and_says_why():
    found = [block for page in PAGES for block in python_blocks(page)]
    skipped = [block for block in found if block.not_run]
    assert len(skipped) <= 3, [f"{block.page}:{block.line}" for block in skipped]
    assert all(len(block.not_run.split()) >= 4 for block in skipped)
    assert len(found) - len(skipped) >= 9
