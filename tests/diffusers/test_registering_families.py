"""A family from outside: one file of code, and every door knows it."""

import pytest
from torch import nn

from dmquant.convert import quantize_
from dmquant.diffusers import families
from dmquant.errors import UsageError
from dmquant.pipelines.models.registry import ModelSpec, family_for
from dmquant.pipelines.models.truncation import cut_prompts

import yaml  # isort: skip

CODE = """
from dmquant.diffusers.families import Family, blocks_in, register

register(
    Family(
        name="toy",
        component="transformer",
        backbones=("ToyBackbone",),
        pipelines=("ToyPipeline",),
        keep={"first": "sees the latents"},
        blocks=blocks_in("blocks"),
        concatenations=lambda backbone: {"blocks.1": 24},
        token_limits={"tokenizer": 2},
    )
)
"""
SPEC = """
name: toy
description: a toy
source: someone/toy
family: toy
pipeline: ToyPipeline
height: 64
width: 64
steps: 4
guidance: 1.0
dtype: bf16
prompts: emoji
calibration_prompts: emoji-calibration
"""


class ToyBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.blocks = nn.ModuleList(nn.Linear(48, 48) for _ in range(2))


class Encoder:
    class config:  # noqa: N801
        model_type = "clip"


class Tokenizer:
    model_max_length = 77

    def __call__(self, texts, **options):
        return type("Tokens", (), {"input_ids": [text.split() for text in texts]})


class ToyPipeline:
    components = {"tokenizer": Tokenizer(), "text_encoder": Encoder()}  # noqa: RUF012

    def __call__(self, prompt):
        """Never called."""


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(families, "_registered", {})
    exec(CODE, {})
    return families.families()["toy"]


def test_quantize_keeps_and_splits_what_it_says(toy):
    plans = {report.plan.name: report.plan for report in quantize_(ToyBackbone(), "w4a6")}
    assert {name: plan.weights.split for name, plan in plans.items()} == {"blocks.0": None, "blocks.1": 24}


def test_its_models_and_the_limits_of_its_tokenizers_are_found(toy):
    assert family_for(ModelSpec.model_validate(yaml.safe_load(SPEC))) == toy
    assert families.family_of_pipeline("ToyPipeline") is families.family_of_backbone("ToyBackbone") is toy
    assert [cut.indices for cut in cut_prompts(ToyPipeline(), ["a cat", "a red cat"], {})] == [(1,)]


def test_a_name_or_a_backbone_is_taken_once(toy):
    with pytest.raises(UsageError, match="is that of family toy"):
        exec(CODE, {})
