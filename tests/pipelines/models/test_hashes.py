"""Hashes that tell one model from another."""

import json

import pytest

from dmquant.pipelines.models.hashes import pipeline_hashes

INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "safety_checker": [None, None],
}
FILES = (
    *("scheduler/scheduler_config.json", "transformer/config.json", "transformer/model.safetensors"),
    *("text_encoder/model.safetensors", "tokenizer/spiece.model", "tokenizer/merges.txt"),
)
OTHERS = (
    *(
        "README.md",
        "checksums.json",
        "transformer/README.md",
        "text_encoder/pytorch_model.bin",
        "transformer/.cache.json.lock",
    ),
    *("checksums.json", "safety_checker/model.safetensors", "runs/report.json", "samples/00000.png"),
)


@pytest.fixture
def folder(tmp_path):
    for name in (*FILES, *OTHERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_makes_the_model_counts(folder, name):
    before = pipeline_hashes(folder)
    assert before.keys() == {"model_index.json", *FILES}
    (folder / name).write_text("something else")
    assert {other for other, digest in pipeline_hashes(folder).items() if before[other] != digest} == {name}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_file_counts(folder, name):
    before = pipeline_hashes(folder)
    (folder / name).write_text("something else")
    assert pipeline_hashes(folder) == before


def test_parts_that_are_left_out_do_not_count(folder):
    assert pipeline_hashes(folder, {"text_encoder": None}).keys() == pipeline_hashes(folder).keys() - {FILES[3]}


def test_progress_ends_at_the_total(folder):
    calls = []
    pipeline_hashes(folder, (), lambda done, total: calls.append((done, total)))
    sizes = [(folder / name).stat().st_size for name in ("model_index.json", *FILES)]
    assert calls[-1] == (sum(sizes), sum(sizes))
