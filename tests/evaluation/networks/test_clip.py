"""CLIP models of random weights, small enough to be made here, against open_clip called directly."""

import json
import logging
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from dmquant.errors import UsageError, UserError
from dmquant.evaluation.images import generated_images
from dmquant.evaluation.metrics.compute import compute
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.networks import CLIP, Networks, clip
from dmquant.evaluation.networks.clip import ClipModel, open_clip
from dmquant.host.files import sha256
from tests.evaluation.conftest import smooth_images, write_images

CONTEXT = 12
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
PROMPTS = ["a red cat", "two dogs on a roof", "", "a naïve café – &amp; more", "the sea", "a Red CAT"]
COMMIT = "0" * 40


def random_weights(path, configuration=TINY, seed=0):
    torch.manual_seed(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(open_clip.CLIP(**configuration).state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "my-clip"
    random_weights(path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": PREPROCESS}))
    return path


@pytest.fixture
def tiny(monkeypatch):
    """An architecture of open_clip called tiny, with weights by the tag openai that want the quick GELU."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    tag = {"hf_hub": "owner/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1, 2, 3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"openai": tag})


def snapshot(cache, repo):
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(COMMIT)
    return home / "snapshots" / COMMIT


@pytest.fixture
def images(tmp_path):
    """As many images as PROMPTS, square, wide and tall."""
    path = write_images(tmp_path / "images", smooth_images(len(PROMPTS), 40))
    Image.open(path / "00001.png").resize((70, 30)).save(path / "00001.png")
    Image.open(path / "00002.png").resize((20, 60)).save(path / "00002.png")
    return path


def score(images, source, prompts=PROMPTS):
    return compute("clip_score", ScoredImages(images, images, prompts=prompts, networks=Networks(clip=str(source))))


def test_clip_score_is_what_open_clip_computes_directly(images, folder):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    expected = []
    with torch.no_grad():
        for path, prompt in zip(generated_images(images), PROMPTS, strict=True):
            image = model.eval().encode_image(transform(Image.open(path))[None])
            expected.append(F.cosine_similarity(image, model.encode_text(tokenizer([prompt]))).item())
    assert min(expected) < 0 < max(expected)  # so that the bound at 0 is seen
    metric = score(images, folder)
    assert metric.values == pytest.approx([100 * max(cosine, 0) for cosine in expected], abs=1e-4)
    assert torch.tensor(metric.values) / 100 == pytest.approx(torch.tensor(expected).clamp(min=0), abs=1e-6)
    assert metric.value == pytest.approx(sum(metric.values) / len(PROMPTS), abs=1e-12)
    assert metric.low < metric.value < metric.high


def test_the_report_calls_it_by_its_own_name_and_hash(images, folder):
    metric = score(images, folder)
    assert metric.backbone.name == "my-clip"
    assert metric.backbone.sha256 == sha256(folder / "open_clip_model.safetensors")
    assert metric.note is None


def test_features_have_length_one_and_do_not_depend_on_the_batch(images, folder):
    model = ClipModel.load(str(folder))
    batch = torch.stack([model.prepare(path) for path in generated_images(images)])
    features = model(batch)
    assert features.dtype == torch.float32
    assert features.norm(dim=1) == pytest.approx(torch.ones(len(PROMPTS)), abs=1e-6)
    assert torch.cat([model(image[None]) for image in batch]) == pytest.approx(features, abs=1e-6)


def test_grey_and_transparent_images_are_scored_as_rgb(tmp_path, folder):
    model = ClipModel.load(str(folder))
    grey = Image.fromarray(smooth_images(1, 40)[0, 0].numpy())
    transparent = grey.convert("RGBA")
    transparent.putalpha(0)
    for image, same in ((grey, grey.convert("RGB")), (transparent, Image.new("RGB", grey.size, "white"))):
        image.save(tmp_path / "image.png")
        same.save(tmp_path / "same.png")
        assert torch.equal(model.prepare(tmp_path / "image.png"), model.prepare(tmp_path / "same.png"))


def test_prompts_that_are_too_long_are_cut_counted_and_said(images, folder):
    model = ClipModel.load(str(folder))
    fits = " ".join(["cat"] * (CONTEXT - 2))  # and a token at either end
    assert model.truncated([*PROMPTS, fits]) == 0
    assert model.truncated([fits, f"{fits} cat", f"{fits} {fits} dog"]) == 2
    assert torch.equal(model.encode_texts([f"{fits} cat"]), model.encode_texts([fits]))
    note = score(images, folder, [*PROMPTS[:-1], f"{fits} cat"]).note
    assert note == f"1 of {len(PROMPTS)} prompts are longer than the text encoder takes and were cut"


def test_a_tokenizer_of_its_own_comes_from_the_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[pad]": 0, "[unk]": 1, "cat": 2, "dog": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    text = {"vocab_size": len(words), "hf_tokenizer_name": "own", "context_length": 4, "pad_id": 0}
    configuration = {**TINY, "text_cfg": {**TINY["text_cfg"], **text}}
    random_weights(tmp_path / "open_clip_model.safetensors", configuration)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", unk_token="[unk]").save_pretrained(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": configuration}))
    model = ClipModel.load(str(tmp_path))
    assert model.tokenizer(["cat dog bird"]).tolist() == [[2, 3, 1, 0]]
    assert model.truncated(["cat", "cat dog cat dog", "cat dog cat dog cat"]) == 1
    assert not torch.equal(model.encode_texts(["cat"]), model.encode_texts(["dog"]))


@pytest.mark.usefixtures("tiny")
def test_weights_of_openai_get_the_quick_gelu_and_their_own_preparation(cache, images):
    path = random_weights(snapshot(cache, "owner/tiny") / "open_clip_model.safetensors")
    tagged, exact = ClipModel.load("tiny:openai"), ClipModel.load(f"tiny:{path}")
    quick = open_clip.create_model("tiny", pretrained=str(path), force_quick_gelu=True).eval()
    image = tagged.prepare(images / "00000.png")[None]
    with torch.no_grad():
        assert torch.equal(tagged(image), quick.encode_image(image, normalize=True))
        assert torch.equal(
            tagged.encode_texts(["a cat"]), quick.encode_text(tagged.tokenizer(["a cat"]), normalize=True)
        )
    assert (tagged(image) - exact(image)).abs().max() > 1e-3
    assert tagged.model.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)
    assert not torch.equal(image, exact.prepare(images / "00000.png")[None])
    assert (tagged.backbone.name, exact.backbone.name) == ("tiny (openai)", "tiny (open_clip_model.safetensors)")
    assert tagged.backbone.sha256 == exact.backbone.sha256
    assert tagged.preparation != exact.preparation  # features are cached by both


def test_every_known_tag_of_openai_asks_for_the_quick_gelu():
    openai = [name for name in open_clip.list_pretrained(as_str=True) if name.endswith(":openai")]
    assert CLIP in openai
    assert all(clip.find(name).options["force_quick_gelu"] for name in openai)
    assert not clip.find("ViT-H-14:laion2b_s32b_b79k").options["force_quick_gelu"]


def test_a_cached_repository_needs_no_network(cache, folder, images):
    shutil.copytree(folder, snapshot(cache, "owner/name"))
    metric = score(images, "hf-hub:owner/name")
    assert metric.backbone.name == "owner/name"


@pytest.mark.usefixtures("cache")
def test_without_weights_the_reason_says_what_how_big_and_how_to_get_them(images):
    reason = score(images, CLIP).reason
    for part in ("ViT-L-14-336 (openai)", "1.71 GB", "no route", "HF_HOME", "timm/vit_large_patch14_clip_336.openai"):
        assert part in reason
    assert "\n" not in reason
    assert "owner/name (size unknown)" in score(images, "hf-hub:owner/name").reason


@pytest.mark.usefixtures("tiny", "cache")
def test_a_download_is_announced_with_its_size(monkeypatch, folder):
    files = [
        SimpleNamespace(rfilename=name, size=1_234_000) for name in ("README.md", clip.WEIGHTS[0], clip.WEIGHTS[2])
    ]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: SimpleNamespace(siblings=files))
    fetched, said = [], []

    def download(repo, allow_patterns):
        fetched.append((repo, allow_patterns[0]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = ClipModel.load("tiny:openai", say=said.append)
    assert fetched == [("owner/tiny", clip.WEIGHTS[0])]
    assert model.backbone.sha256 == sha256(folder / clip.WEIGHTS[0])
    assert len(said) == 1
    assert "tiny (openai) (1.23 MB) from owner/tiny" in said[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ViT-B32:openai", "did you mean 'ViT-B-32:openai'"),
        ("ViT-B-32:opanai", "did you mean 'openai'"),
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("/no/such/folder", "hf-hub:OWNER/NAME"),
    ],
)
def test_an_unknown_name_is_wrong_usage(name, part):
    with pytest.raises(UsageError, match="unknown") as caught:
        clip.find(name)
    assert part in str(caught.value)


def test_a_folder_that_is_no_model_says_what_it_lacks(tmp_path):
    with pytest.raises(UsageError, match=r"has no open_clip_config\.json"):
        clip.find(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"needs open_clip_model\.safetensors"):
        clip.find(str(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "other", "pickle"])
@pytest.mark.usefixtures("tiny")
def test_a_file_with_other_weights_is_one_line(tmp_path, folder, damage):
    path = folder / "open_clip_model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "other":
        save_file({"weight": torch.zeros(1)}, path)
    else:
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": {"weight": print}}, path)
    source = f"tiny:{path}" if damage == "pickle" else str(folder)
    with pytest.raises(UserError, match="does not hold the weights") as caught:
        ClipModel.load(source)
    assert "\n" not in str(caught.value)


def test_loading_is_quiet(folder, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        ClipModel.load(str(folder))
    assert not caplog.records
    assert capsys.readouterr().err == ""


def test_the_sizes_told_without_a_network_are_those_of_the_architectures():
    with torch.device("meta"):
        for name, parameters in clip.PARAMETERS.items():
            configuration = open_clip.get_model_config(name)
            assert sum(tensor.numel() for tensor in open_clip.CLIP(**configuration).parameters()) == parameters
