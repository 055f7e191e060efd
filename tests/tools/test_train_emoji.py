"""The training tool on a package of eight drawn emoji and budgets of seconds: what it writes, and that it resumes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from dmquant.torchvision_guard import ensure_torchvision_imports

ensure_torchvision_imports()

from diffusers import PixArtSigmaPipeline

TOOL = Path(__file__).parents[2] / "tools" / "train_emoji.py"
COLOURS = ("red", "green", "blue", "black")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_emoji", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Four colours of circle and square, and an entry without an image."""
    root = tmp_path_factory.mktemp("package")
    folder = root / "img/google/64"
    folder.mkdir(parents=True)
    entries = [{"image": "none.png", "name": "NOTHING", "category": "Symbols", "has_img_google": False}]
    for colour in COLOURS:
        for shape in ("ellipse", "rectangle"):
            icon = Image.new("RGBA", (64, 64))
            getattr(ImageDraw.Draw(icon), shape)((8, 8, 56, 56), fill=colour)
            icon.save(folder / f"{colour}-{shape}.png")
            entries.append(
                {
                    "image": f"{colour}-{shape}.png",
                    "name": f"{colour} {shape}".upper(),
                    "category": "Symbols",
                    "subcategory": "geometric-shape",
                    "has_img_google": True,
                }
            )
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


def train(tool, package, out, seconds):
    stages = [argument for stage in tool.SHARE_OF_MINUTES for argument in (f"--{stage}-minutes", str(seconds / 60))]
    sizes = ["--vae-batch", "2", "--transformer-batch", "4", "--width", "32", "--depth", "1", "--device", "cpu"]
    tool.main(["--data", str(package), "--out", str(out), *stages, *sizes])
    return json.loads((out / "training.json").read_text())


def test_loads_captioned_images_on_white(tool, package):
    images, captions = tool.load_emoji(package)
    assert images.shape == (8, 3, 64, 64)
    assert captions[0] == "red ellipse, symbols, geometric shape"
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

    pipeline = PixArtSigmaPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "red ellipse, symbols, geometric shape",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=tool.TEXT_LENGTH,
        clean_caption=False,
        use_resolution_binning=False,
    ).images[0]
    assert image.size == (64, 64)
    for file in (tmp_path / "pipeline").rglob("*.json"):
        assert "_name_or_path" not in file.read_text()
        assert str(tmp_path) not in file.read_text()


def test_resuming_gives_the_average_that_was_saved(tool, tmp_path):
    """Packaging a checkpoint must not lose what it was trained to, and must not train."""

    def training(minutes):
        torch.manual_seed(1)
        module = torch.nn.Linear(4, 4, bias=False)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        return module, tool.Training("toy", {"toy": module}, [optimizer], minutes, 0.9, tmp_path)

    target = torch.eye(4)
    module, first = training(0.3 / 60)
    start = (module.weight - target).square().mean().item()
    first.run(lambda: (module(torch.eye(4)) - target).square().mean(), tool.cosine)
    resumed, second = training(0)
    second.run(lambda: pytest.fail("a spent budget must not train"), tool.cosine)
    assert second.steps == first.steps
    assert torch.equal(resumed.weight, module.weight)
    assert (module.weight - target).square().mean().item() < start


def test_a_folder_that_is_no_package_is_refused_in_one_line(tool, tmp_path):
    with pytest.raises(SystemExit, match=r"has no emoji\.json"):
        tool.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
