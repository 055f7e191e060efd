"""The training tool on a package of eight drawn emoji and budgets of seconds: what it writes, and that it resumes."""

import json

import pytest
import torch

from dmquant.diffusers.torchvision import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

CAPTION = "red ellipse, symbols, geometric shape"


@pytest.fixture
def tool(tools):
    return tools("train_emoji")


def train(tool, package, out, seconds, model="pixart", more=()):
    stages = [argument for stage in tool.SHARE_OF_MINUTES for argument in (f"--{stage}-minutes", str(seconds / 60))]
    sizes = ["--vae-batch", "2", "--denoiser-batch", "4", "--width", "32", "--depth", "1", "--device", "cpu"]
    tool.main([model, "--data", str(package), "--out", str(out), *stages, *sizes, *more])
    return json.loads((out / "training.json").read_text())


def draw(folder, **call):
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline(CAPTION, height=64, width=64, num_inference_steps=2, **call).images[0]


def test_loads_captioned_images_on_white(tools, package):
    images, captions = tools("emoji_data").load_emoji(package)
    assert images.shape == (8, 3, 64, 64)
    assert captions[0] == CAPTION
    assert torch.equal(images[0, :, 0, 0], torch.ones(3))
    assert torch.equal(images[0, :, 32, 32], torch.tensor([1.0, -1.0, -1.0]))


def test_writes_a_pipeline_and_resumes(tool, package, tmp_path):
    first = train(tool, package, tmp_path, seconds=0.5)
    again = train(tool, package, tmp_path, seconds=0)
    stages = list(tool.SHARE_OF_MINUTES)
    assert all(first[stage]["steps"] > 0 for stage in stages)
    assert [again[stage] for stage in stages] == [first[stage] for stage in stages]
    spent = max(first[stage]["minutes"] for stage in stages)
    further = train(tool, package, tmp_path, seconds=60 * spent + 1)
    assert all(further[stage]["steps"] > first[stage]["steps"] for stage in stages)

    _, image = draw(tmp_path / "pipeline", max_sequence_length=24, clean_caption=False, use_resolution_binning=False)
    assert image.size == (64, 64)
    for file in (tmp_path / "pipeline").rglob("*.json"):
        assert "_name_or_path" not in file.read_text()
        assert str(tmp_path) not in file.read_text()


def test_stable_diffusion_shares_a_finished_vae(tool, package, tmp_path):
    train(tool, package, tmp_path / "pixart", seconds=0.3)
    vae = tmp_path / "pixart/pipeline/vae"
    facts = train(tool, package, tmp_path / "sd", seconds=0.5, model="sd", more=["--vae", str(vae)])
    assert facts["denoiser"]["steps"] > 0
    assert facts["vae"] == "shared"
    weights = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "sd/pipeline/vae" / weights).read_bytes() == (vae / weights).read_bytes()
    pipeline, image = draw(tmp_path / "sd/pipeline")
    assert isinstance(pipeline, StableDiffusionPipeline)
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert image.size == (64, 64)


def test_resuming_gives_the_average_that_was_saved(tools, tmp_path):
    """Packaging a checkpoint must not lose what it was trained to, and must not train."""
    emoji_training = tools("emoji_training")

    def training(minutes):
        torch.manual_seed(1)
        module = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return module, emoji_training.Training("toy", {"toy": module}, [optimizer], minutes, 0.9, tmp_path)

    target = torch.eye(4)
    module, first = training(0.3 / 60)
    start = (module.weight - target).square().mean().item()
    first.run(lambda: (module(torch.eye(4)) - target).square().mean(), emoji_training.cosine)
    resumed, second = training(0)
    second.run(lambda: pytest.fail("a spent budget must not train"), emoji_training.cosine)
    assert second.steps == first.steps
    assert torch.equal(resumed.weight, module.weight)
    assert (module.weight - target).square().mean().item() < start


def test_a_folder_that_is_no_package_is_refused_in_one_line(tool, tmp_path):
    with pytest.raises(SystemExit, match=r"has no emoji\.json"):
        tool.main(["pixart", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
