"""The training tool of emoji-clip on eight drawn emoji and budgets of seconds, and what it writes."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.pipelines.models.registry import embedded_folder

ensure_torchvision_imports()

import open_clip
from safetensors import safe_open
from torchvision.transforms.functional import gaussian_blur

VAE = embedded_folder("embedded:emoji-pixart") / "vae"
STEP = 0.1  # seconds that a step takes by the clock of these tests


@pytest.fixture(autouse=True)
def _steps_take_the_same_time_on_every_machine(tools, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(tools("emoji_training"), "time", SimpleNamespace(monotonic=lambda: STEP * next(clock)))


@pytest.fixture
def emoji_clip(tools):
    return tools("emoji_clip")


def train(tools, package, out, seconds):
    sizes = ["--width", "64", "--depth", "2", "--batch", "8", "--device", "cpu"]
    minutes = ["--minutes", str(seconds / 60)]
    tools("train_emoji_clip").main(["--data", str(package), "--out", str(out), "--vae", str(VAE), *minutes, *sizes])
    return json.loads((out / "training.json").read_text())


def write_pictures(tools, package, folder):
    """What score_emoji.py writes of a pipeline that draws the real images of four captions."""
    score_emoji = tools("score_emoji")
    images, _ = tools("emoji_data").load_emoji(package)
    own = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))[:4]
    for kind in ("generated", "reconstructed"):
        score_emoji.save(score_emoji.to_pil(images[own]), folder / kind)
    (folder / "score.json").write_text(json.dumps({"seed": 3, "captions": 4}))
    return folder


def score(tools, package, model, pictures, out):
    folders = ["--data", str(package), "--model", str(model), "--out", str(out), "--pictures", str(pictures)]
    tools("score_emoji_clip").main(folders)
    return json.loads((out / "score.json").read_text())["pictures"]


@pytest.mark.slow
def test_trains_writes_for_open_clip_and_resumes(tools, package, tmp_path):
    first = train(tools, package, tmp_path, seconds=40 * STEP)
    again = train(tools, package, tmp_path, seconds=0)
    assert again["clip"] == first["clip"]
    assert first["clip"]["steps"] in (40, 41)  # by rounding of the clock
    further = train(tools, package, tmp_path, seconds=80 * STEP)
    assert further["clip"]["steps"] in (80, 81)

    folder = tmp_path / "model"
    with safe_open(folder / "open_clip_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
    for file in folder.glob("*.json"):
        assert str(tmp_path) not in file.read_text()
    scored = score(tools, package, folder, write_pictures(tools, package, tmp_path / "drawn"), tmp_path / "score")
    for kind in ("real", "drawn: generated", "drawn: reconstructed"):
        assert scored[kind]["top1"] >= 0.5
        assert scored[kind]["cosine"] > scored[kind]["cosine_of_another_caption"] + 5


def test_text_is_padded_ended_and_cut_as_the_text_tower_expects(tools, package, tmp_path):
    train(tools, package, tmp_path, seconds=0)
    folder = f"local-dir:{tmp_path / 'model'}"
    model, _, prepare = open_clip.create_model_and_transforms(folder)
    tokens = open_clip.get_tokenizer(folder)(["red ellipse", "red ellipse " * 40])
    assert tokens.shape == (2, model.context_length)
    assert (tokens == model.text_eos_id).sum(1).tolist() == [1, 1]
    assert tokens[1, -1] == model.text_eos_id
    assert tokens[0, -1] == 0
    padded = tokens.clone()
    padded[0, tokens[0].tolist().index(model.text_eos_id) + 1 :] = 5  # what follows the end is not looked at
    model.eval()
    assert torch.equal(model.encode_text(padded), model.encode_text(tokens))
    assert [part.mean for part in prepare.transforms if hasattr(part, "mean")] == [[0.5] * 3]


def test_a_caption_is_told_whole_and_in_parts(emoji_clip):
    assert emoji_clip.caption_forms("family: man, boy, people & body, family") == [
        "family: man, boy, people & body, family",
        "family: man, boy, family",
        "family: man, boy, people & body",
        "family: man, boy",
    ]


def test_augmentation_keeps_white_and_sides(emoji_clip):
    torch.manual_seed(0)
    halves = torch.ones(32, 3, 64, 64)
    halves[:, :, :, 8:32] = -1
    made = emoji_clip.augment(halves)
    assert made.shape == halves.shape
    assert made.abs().max() <= 1
    assert (made[..., 16:24].mean((1, 2, 3)) < -0.7).all()
    assert (made[..., 44:].mean((1, 2, 3)) > 0.9).all()
    untouched = [torch.allclose(image, halves[0], atol=1e-4) for image in made]
    assert 0 < sum(untouched) < 16


@pytest.mark.parametrize("sigma", [0.0, 0.8, 2.0])
def test_blur_is_gaussian(tools, sigma):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    made = tools("score_emoji_clip").blur(images, sigma)
    size = 2 * math.ceil(3 * sigma) + 1
    inner = (..., slice(6, -6), slice(6, -6))  # torchvision continues the edge otherwise
    expected = gaussian_blur(images, [size, size], [sigma, sigma]) if sigma else images
    torch.testing.assert_close(made[inner], expected[inner])


def test_reconstructions_stay_close_and_differ_by_their_noise(tools, package, emoji_clip):
    from diffusers import AutoencoderKL

    images, _ = tools("emoji_data").load_emoji(package)
    vae = AutoencoderKL.from_pretrained(VAE, dtype=torch.float32)
    torch.manual_seed(0)
    first, second = emoji_clip.reconstruct(vae, images), emoji_clip.reconstruct(vae, images)
    assert first.abs().max() <= 1
    assert (first - images).square().mean() < 0.1
    assert not torch.equal(first, second)


def test_a_folder_that_is_no_package_is_refused_in_one_line(tools, tmp_path):
    with pytest.raises(SystemExit, match=r"has no emoji\.json"):
        tools("train_emoji_clip").main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--vae", str(VAE)])
    assert not (tmp_path / "out").exists()
