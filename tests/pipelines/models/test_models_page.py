"""docs/models.md says what the code does: names, kept layers with their reasons, and an example that works."""

import fnmatch
import re
from pathlib import Path

import torch
import yaml

import dmquant  # before diffusers, for which it makes torchvision importable
from dmquant.diffusers.families import families
from dmquant.pipelines.models.registry import ModelSpec, registered_models
from dmquant.recipe import Recipe

from diffusers import AuraFlowTransformer2DModel  # isort: skip

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text("utf-8")


def example(language):
    """The block of code in that language under "Adding a family"."""
    return re.search(rf"```{language}\n(.*?)```", PAGE.partition("## Adding a family")[2], re.DOTALL)[1]


def test_every_model_pipeline_and_kept_layer_is_on_the_page():
    assert [name for name in registered_models() if f"`{name}`" not in PAGE] == []
    for family in families().values():
        assert [name for name in (*family.pipelines, *family.edits) if name not in PAGE] == []
        rows = [f"| {family.name} | `{glob}` | {why} |" for glob, why in family.keep.items()]
        assert [row for row in rows if row not in PAGE] == []


def test_the_example_of_a_family_is_the_code():
    root = Path(__file__).parents[3]
    assert example("python") == (root / "dmquant" / "diffusers" / "families" / "auraflow.py").read_text("utf-8")
    assert example("yaml") == (root / "configs" / "models" / "auraflow.yaml").read_text("utf-8")


def test_the_example_of_a_family_quantizes_its_backbone():
    space = {}
    exec(example("python"), space)
    family, spec = space["FAMILY"], ModelSpec.model_validate(yaml.safe_load(example("yaml")))
    assert (spec.family, spec.pipeline) == (family.name, *family.pipelines)
    backbone = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    layers = [name for name, layer in backbone.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert all(fnmatch.filter(layers, glob) for glob in family.keep)
    reports = dmquant.quantize_(backbone, Recipe.load("w4a6").keeping(family.keep))
    quantized = [report.plan.name for report in reports]
    blocks = family.blocks(backbone)
    assert [sum(name.startswith(f"{block}.") for block in blocks) for name in quantized] == [1] * len(quantized)
    kept = set(layers) - set(quantized)
    assert all(any(fnmatch.fnmatchcase(name, glob) for glob in family.keep) for name in kept)
    made = backbone(torch.randn(1, 4, 8, 8), torch.randn(1, 3, 32), torch.tensor([0.5]), return_dict=False)[0]
    assert made.shape == (1, 4, 8, 8)
    assert made.isfinite().all()
