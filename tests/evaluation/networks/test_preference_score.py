"""HPSv2 against the hpsv2 package: its own code, with a small network in place of ViT-H-14 and random weights."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation import networks as networks_module
from dmquant.evaluation.images import generated_images
from dmquant.evaluation.metrics.compute import compute
from dmquant.evaluation.metrics.scored_images import ScoredImages
from dmquant.evaluation.networks import Networks, perceptual_distance, preference_score
from dmquant.evaluation.networks.clip import open_clip
from dmquant.evaluation.networks.preference_score import ENVIRONMENT, MEAN, STD, HPSv2, prepare
from dmquant.host.files import sha256
from tests.evaluation.conftest import smooth_images

PACKAGE = "hpsv2==1.2.0"
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SIZES = [(64, 64), (512, 512), (320, 200), (90, 400), (224, 224), (1023, 767), (301, 299)]  # width, height
PROMPTS = [
    "a red cat",
    "",
    "A naïve   café &amp; “quotes” – 3.5 o'clock",
    "日本の山 🙂",
    " ".join(["an astronaut riding a horse"] * 30),
    "two dogs on a roof",
    "the sea",
]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Where the code of the hpsv2 package is, without what it depends on: it pins protobuf<4 and pytest 7."""
    target = tmp_path_factory.mktemp("hpsv2")
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--retries=0", "--timeout=20", f"--target={target}"]
    command = [sys.executable, "-m", "pip", "install", *options, PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"pip cannot get {PACKAGE}: {result.stderr.strip().splitlines()[-1:]}")
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    shutil.copy(vocabulary, target / "hpsv2/src/open_clip")  # missing from the package; the same file
    return target


@pytest.fixture
def theirs(package, tmp_path, monkeypatch):
    """The package's module img_score, on the CPU and with the small network."""
    bars = ModuleType("clint.textui")
    bars.progress = None
    for name, module in {
        "clint": ModuleType("clint"),
        "clint.textui": bars,
        "requests": ModuleType("requests"),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("HPS_ROOT", str(tmp_path / "hps"))
    monkeypatch.syspath_prepend(package)
    from hpsv2 import img_score
    from hpsv2.src.open_clip import create_model_and_transforms, factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-H-14", SMALL)
    model, _, transform = create_model_and_transforms(
        "ViT-H-14",
        None,
        precision="amp",
        device="cpu",
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
    )
    monkeypatch.setattr(img_score, "device", "cpu")
    monkeypatch.setattr(img_score, "model_dict", {"model": model, "preprocess_val": transform})
    yield img_score
    for name in [name for name in sys.modules if name.partition(".")[0] == "hpsv2"]:
        del sys.modules[name]


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A folder with a checkpoint of the small network for each version, which DMQUANT_HPSV2 names."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", SMALL)
    folder = tmp_path / "weights"
    folder.mkdir()
    for seed, name in enumerate(preference_score.FILES.values()):
        torch.manual_seed(seed)
        torch.save({"state_dict": open_clip.CLIP(**SMALL).state_dict()}, folder / name)
    monkeypatch.setenv(ENVIRONMENT, str(folder))
    return folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, (size, picture) in enumerate(zip(SIZES, smooth_images(len(SIZES), 64), strict=True)):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index:05d}.png")
    return folder


@pytest.mark.filterwarnings("ignore:User provided device_type")
@pytest.mark.parametrize(("metric", "version"), [("hpsv2", "2.0"), ("hpsv21", "2.1")])
def test_scores_equal_those_of_the_package(theirs, weights, images, metric, version):
    checkpoint = str(weights / preference_score.FILES[version])
    expected = [
        float(theirs.score(str(path), prompt, cp=checkpoint)[0])
        for path, prompt in zip(generated_images(images), PROMPTS, strict=True)
    ]
    assert max(expected) - min(expected) > 0.1  # not one number for all
    result = compute(metric, ScoredImages(images, images, prompts=PROMPTS))
    assert result.values == pytest.approx(expected, abs=1e-6)
    assert result.images == len(SIZES)
    assert result.backbone.name == f"HPSv2 {version} (ViT-H-14)"
    assert result.backbone.sha256 == sha256(weights / preference_score.FILES[version])
    assert result.note == f"1 of {len(PROMPTS)} prompts are longer than the text encoder takes and were cut"


def test_images_are_prepared_bit_for_bit_as_the_package_does(theirs, images):
    transform = theirs.model_dict["preprocess_val"]
    for path in generated_images(images):
        assert torch.equal(prepare(path), transform(Image.open(path)))


def test_the_whole_image_is_seen_and_the_rest_is_black(tmp_path):
    Image.new("RGB", (224, 100), "white").save(tmp_path / "wide.png")  # the package leaves this size unpadded and fails
    prepared = prepare(tmp_path / "wide.png")
    white, black = ((value - torch.tensor(MEAN)) / torch.tensor(STD) for value in (1, 0))
    assert prepared.shape == (3, 224, 224)
    assert torch.allclose(prepared[:, 62:162], white.view(3, 1, 1).expand(3, 100, 224))
    assert torch.allclose(prepared[:, :62], black.view(3, 1, 1).expand(3, 62, 224))
    assert torch.allclose(prepared[:, 162:], black.view(3, 1, 1).expand(3, 62, 224))


def test_a_line_of_pixels_is_an_image(tmp_path):
    Image.new("RGB", (1000, 1)).save(tmp_path / "line.png")
    assert prepare(tmp_path / "line.png").shape == (3, 224, 224)


def test_grey_and_transparent_images_are_scored_as_rgb(tmp_path):
    grey = Image.fromarray(smooth_images(1, 40)[0, 0].numpy())
    transparent = grey.convert("RGBA")
    transparent.putalpha(0)
    for image, same in ((grey, grey.convert("RGB")), (transparent, Image.new("RGB", grey.size, "white"))):
        image.save(tmp_path / "image.png")
        same.save(tmp_path / "same.png")
        assert torch.equal(prepare(tmp_path / "image.png"), prepare(tmp_path / "same.png"))


def test_a_model_is_loaded_once_for_all_images_and_both_sides(weights, images, monkeypatch):
    loaded = []
    load = HPSv2.load
    monkeypatch.setattr(HPSv2, "load", lambda *arguments: loaded.append(arguments[0]) or load(*arguments))
    networks = Networks()
    for name in ("hpsv2", "hpsv21", "hpsv2"):
        assert compute(name, ScoredImages(images, images, prompts=PROMPTS, networks=networks)).value is not None
    assert loaded == ["2.0", "2.1"]


def test_one_at_a_time_no_other_network_stays_in_memory(monkeypatch):
    class Network:
        @classmethod
        def load(cls, *arguments):
            there.add(network := cls())
            return network

    there = weakref.WeakSet()
    for where, name in ((networks_module, "Inception"), (preference_score, "HPSv2")):
        monkeypatch.setattr(where, name, Network)
    monkeypatch.setattr(perceptual_distance, "load_lpips", Network.load)
    networks, all_of_them = Networks(one_at_a_time=True), Networks()
    for one in (
        lambda of: of.inception,
        lambda of: of.hpsv2("2.1"),
        lambda of: of.hpsv2("2.0"),
        lambda of: of.lpips("vgg"),
    ):
        assert one(networks) is one(networks)
        assert len(there) == 1
    for one in (lambda of: of.inception, lambda of: of.hpsv2("2.1"), lambda of: of.lpips("vgg")):
        one(all_of_them)
    assert len(there) == 4


@pytest.mark.usefixtures("cache")
def test_without_weights_the_reason_says_what_how_big_and_how_to_get_them(images, tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))  # a folder without them
    reason = compute("hpsv21", ScoredImages(images, images, prompts=PROMPTS)).reason
    for part in (
        "HPSv2 2.1",
        "3.94 GB",
        "xswu/HPSv2",
        "no route",
        ENVIRONMENT,
        "HPS_v2.1_compressed.pt",
    ):
        assert part in reason


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"DMQUANT_HPSV2 is set to .*absent, which is not a folder"):
        HPSv2.load("2.0")


def test_another_checkpoint_is_refused(weights):
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, weights / preference_score.FILES["2.0"])
    with pytest.raises(UserError, match=r"HPS_v2_compressed\.pt does not hold the weights of ViT-H-14"):
        HPSv2.load("2.0")
