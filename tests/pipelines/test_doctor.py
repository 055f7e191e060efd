import shutil

import huggingface_hub
import pytest

from dmquant.pipelines import doctor, hub
from dmquant.pipelines.registry import registered_models


@pytest.fixture
def checks(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "reachable", lambda seconds: False)
    return {check.name: check for check in doctor.examine()}


def test_every_model_library_and_weight_has_its_line(checks):
    assert {"Python", "torch", "memory", "disk", "torchvision", "Hub", "Inception weights"} <= checks.keys()
    assert {*doctor.LIBRARIES, *registered_models()} <= checks.keys()


def test_what_is_missing_comes_with_a_remedy_and_what_is_there_without(checks):
    for check in checks.values():
        assert (check.status == "ok") == (not check.remedy), check
        assert "\n" not in check.detail + check.remedy


def test_a_model_that_is_not_cached_says_what_its_download_takes(checks):
    assert checks["pixart-sigma"].status == "missing"
    assert "21.8 GB" in checks["pixart-sigma"].remedy


def test_the_embedded_model_is_intact(checks):
    assert checks["emoji-pixart"].status == "ok", checks["emoji-pixart"].detail


def test_a_damaged_embedded_model_is_reported_and_not_raised(tmp_path, monkeypatch):
    spec = registered_models()["emoji-pixart"]
    damaged = shutil.copytree(doctor.embedded_folder(spec), tmp_path / "emoji")
    weights = next(damaged.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(doctor, "embedded_folder", lambda spec: damaged)
    check = doctor._embedded(spec)
    assert check.status == "missing"
    assert weights.name in check.detail
