"""The embedded emoji-clip: it loads through open_clip alone, and tells what pictures of emoji-pixart show."""

import pytest
import torch

from dmquant.evaluation.networks.clip import ClipModel
from dmquant.pipelines.models.loading import load_full_precision
from dmquant.pipelines.models.registry import embedded_folder, registered_models
from dmquant.pipelines.prompts.lists import load_prompts

import open_clip  # isort: skip
from torchvision.transforms.functional import gaussian_blur

FOLDER = embedded_folder("embedded:emoji-clip")
COUNT = 12
COMPOSITIONS = (3, 7)  # places in every nine prompts that the training set has not
BLURS, NOISES = (2.0, 4.0), (0.1, 0.2, 0.4)  # pixels, standard deviation in 0..1


@pytest.fixture(scope="module")
def prompts():
    return [prompt for index, prompt in enumerate(load_prompts("emoji")) if index % 9 not in COMPOSITIONS]


@pytest.fixture(scope="module")
def pictures(prompts):
    """What emoji-pixart draws of the first prompts: float [COUNT, 3, 64, 64] in 0..1."""
    spec = registered_models()["emoji-pixart"]
    pipeline = load_full_precision(spec, torch.float32, "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts[:COUNT],
        height=spec.height,
        width=spec.width,
        num_inference_steps=10,
        guidance_scale=spec.guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in range(COUNT)],
        output_type="pt",
        **spec.call,
    ).images


@pytest.fixture(scope="module")
def model():
    return ClipModel.load(str(FOLDER))


def cosines(model, images, texts):
    return model(images * 2 - 1) @ model.encode_texts(texts).T


def test_it_takes_8_megabytes_with_its_card():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) <= 8_000_000
    assert (FOLDER / "README.md").is_file()


def test_open_clip_alone_gives_the_same_features(model, prompts, tmp_path, pictures):
    from torchvision.transforms.functional import to_pil_image

    to_pil_image(pictures[0]).save(tmp_path / "0.png")
    alone, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}")
    alone.eval()
    image = prepare(to_pil_image(pictures[0]))[None]
    tokens = open_clip.get_tokenizer(f"local-dir:{FOLDER}")(prompts[:COUNT])
    with torch.inference_mode():
        assert torch.equal(alone.encode_image(image, normalize=True), model(model.prepare(tmp_path / "0.png")[None]))
        assert torch.equal(alone.encode_text(tokens, normalize=True), model.encode_texts(prompts[:COUNT]))


def test_reports_call_it_by_its_own_name(model):
    assert model.backbone.name == "emoji-clip"


def test_a_drawn_picture_is_nearest_to_its_own_prompt(model, pictures, prompts):
    assert cosines(model, pictures, prompts).argmax(1).tolist() == list(range(COUNT))


def test_damage_lowers_the_score(model, pictures, prompts):
    def score(images):
        return cosines(model, images.clamp(0, 1), prompts[:COUNT]).diag().mean().item()

    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    blurred = [score(gaussian_blur(pictures, [17, 17], [sigma, sigma])) for sigma in BLURS]
    noisy = [score(pictures + strength * noise) for strength in NOISES]
    for scores in ([score(pictures), *blurred], [score(pictures), *noisy]):
        assert sorted(scores, reverse=True) == scores
        assert scores[-1] < 0.9 * scores[0]
